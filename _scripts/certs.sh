#!/usr/bin/env bash
# Makes an authority and a certificate for each node, to try TLS out: for anything else use an authority of your own.
#
#   _scripts/certs.sh DIR NODE...
#
# DIR/ca.pem is the authority, DIR/<node>.pem and DIR/<node>-key.pem are what the node shows. A NODE is its id in PEERS, and
# after commas other names and addresses of it (node1,host1.example,10.1.1.1). localhost and 127.0.0.1 are always among them,
# for curl on this machine. An authority that is there already signs the new certificates; those that are there are replaced.
set -euo pipefail
(($# >= 2)) || { sed -n 's/^# \{0,1\}//; 2,8p' "$0"; exit 2; }
dir=$1
shift
umask 077
mkdir -p "$dir"

if [[ ! -e $dir/ca.pem ]]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 3650 -subj "/CN=Raft Starter test authority" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$dir/ca-key.pem" -out "$dir/ca.pem" 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
  echo "made the authority $dir/ca.pem"
fi

for node in "$@"; do
  id=${node%%,*} names=
  for name in ${node//,/ } localhost 127.0.0.1; do
    if [[ $name == *:* || $name =~ ^[0-9]+(\.[0-9]+){3}$ ]]; then
      names+=,IP:$name
    else
      names+=,DNS:$name
    fi
  done
  {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj "/CN=$id" -keyout "$dir/new-key.pem" -out "$dir/new.csr"
    openssl x509 -req -in "$dir/new.csr" -CA "$dir/ca.pem" -CAkey "$dir/ca-key.pem" -CAcreateserial -days 365 -out "$dir/new.pem" \
      -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n' "${names#,}")
  } 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
  mv "$dir/new-key.pem" "$dir/$id-key.pem"
  mv "$dir/new.pem" "$dir/$id.pem"
  echo "made $dir/$id.pem for ${names#,}"
done
rm -f "$dir/new.csr" "$dir/log"
