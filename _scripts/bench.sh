#!/usr/bin/env bash
# Measures this service beside etcd on this machine: three nodes each on loopback, in turn, on the same disk, with public
# tools only (hey for HTTP, etcd's own benchmark for gRPC). Each client writes or reads 256-byte values at the leader, in a
# closed loop, on as many connections as there are clients. Prints a table, and writes docs/performance.csv.
#
#   _scripts/bench.sh [ROUNDS]      CLIENTS="1 16 64 256 1024"; TOOLS and WORK are directories for programs and data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=${1:-3} clients=${CLIENTS:-1 16 64 256 1024}
tools=$(realpath -m "${TOOLS:-tmp/bench-tools}")
mkdir -p "$tools" "${WORK:-tmp}"
work=$(mktemp -d "${WORK:-tmp}/bench.XXXXXX")
work=$(realpath "$work")
pids=()
stop() {
  ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  pids=()
  rm -rf "$work"/node*
}
trap 'stop; rm -rf "$work"' EXIT

# tool NAME PACKAGE MODULE@VERSION builds a program, in a module of its own.
tool() {
  [[ -x $tools/$1 ]] && return
  mkdir "$work/$1"
  (cd "$work/$1" && go mod init bench && go get "$3" && go build -mod=mod -o "$tools/$1" "$2") >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}
tool etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3@v3.7.3
tool benchmark go.etcd.io/etcd/v3/tools/benchmark go.etcd.io/etcd/v3@v3.6.8
tool hey github.com/rakyll/hey github.com/rakyll/hey@v0.1.5
go build -o "$work/raftstarter" .

host=127.0.0.1 value=$(printf 'x%.0s' {1..256})

start_ours() { # sets leader
  local i id peers=node1@$host:22001,node2@$host:22002,node3@$host:22003
  for i in 1 2 3; do
    env NODE_ID=node$i STATE_DIR="$work/node$i" HTTP_ADDR=$host HTTP_PORT=2100$i RAFT_ADDR=$host RAFT_PORT=2200$i PEERS=$peers \
      LOG_LEVEL=warn "$work/raftstarter" >"$work/log$i" 2>&1 &
    pids+=($!)
  done
  for ((i = 0; i < 100; i++)); do
    id=$(curl -s -m 2 -o "$work/ready" -D - "http://$host:21001/readyz" | tr -d '\r' | sed -n 's/^Raft-Leader: node//Ip' || true)
    if [[ -n $id && $(<"$work/ready") == ok ]]; then
      leader=$host:2100$id
      return
    fi
    sleep 0.1
  done
  cat "$work/log1"
  exit 1
}

start_etcd() {
  local i
  for i in 1 2 3; do
    "$tools/etcd" --name n$i --data-dir "$work/node$i" --log-level error \
      --listen-client-urls "http://$host:2100$i" --advertise-client-urls "http://$host:2100$i" \
      --listen-peer-urls "http://$host:2200$i" --initial-advertise-peer-urls "http://$host:2200$i" \
      --initial-cluster "n1=http://$host:22001,n2=http://$host:22002,n3=http://$host:22003" >"$work/log$i" 2>&1 &
    pids+=($!)
  done
  sleep 4
  leader=
  for i in 1 2 3; do
    if curl -s "http://$host:2100$i/metrics" | grep '^etcd_server_is_leader 1' >"$work/out"; then
      leader=$host:2100$i
    fi
  done
  [[ -n $leader ]] || { cat "$work/log1"; exit 1; }
}

# note SYSTEM WORK CLIENTS reads what hey or benchmark prints and adds a line to the results.
note() {
  awk -v row="$1,$2,$3" '/Requests\/sec:/ { rate = $2 } $1 == "50%" { p50 = $3 } $1 == "99%" { p99 = $3 } $1 == "99%%" { p99 = $3 } $1 == "50%%" { p50 = $3 }
    END { if (!rate) exit 1; printf "%s,%.0f,%.3f,%.3f\n", row, rate, p50 * 1000, p99 * 1000 }' "$work/out" | tee -a "$work/results" >&2
}

for ((round = 1; round <= rounds; round++)); do
  echo "round $round of $rounds" >&2
  for system in ours etcd; do
    "start_$system"
    for work_kind in write linearizable stale; do
      for c in $clients; do
        total=$((c == 1 ? 3000 : 60000 - 60000 % c))
        [[ $work_kind == write ]] || total=$((total * 2))
        case $system-$work_kind in
          ours-write) command=("$tools/hey" -n $total -c "$c" -m PUT -d "\"$value\"" "http://$leader/key/k") ;;
          ours-*) command=("$tools/hey" -n $total -c "$c" "http://$leader/key/k?consistency=$work_kind") ;;
          etcd-write) command=("$tools/benchmark" --endpoints "$leader" --conns "$c" --clients "$c" put --total $total --key-space-size 1 --key-size 1 --val-size 256) ;;
          etcd-*) command=("$tools/benchmark" --endpoints "$leader" --conns "$c" --clients "$c" range k --total $total --consistency "${work_kind:0:1}") ;;
        esac
        "${command[@]}" >"$work/out" 2>&1 || { cat "$work/out"; exit 1; }
        note "$system" "$work_kind" "$c"
      done
    done
    stop
  done
done

# Medians (of an even number the lower), and beside each of ours its ratio to etcd's.
sort -t, -k1,3 "$work/results" | awk -F, '
function flush() { if (key) { m = int((n + 1) / 2); print key "," sorted(rate) "," sorted(p50) "," sorted(p99) } n = 0 }
function sorted(a,  i, j, t) { for (i = 2; i <= n; i++) for (j = i; j > 1 && a[j] < a[j-1]; j--) { t = a[j]; a[j] = a[j-1]; a[j-1] = t } return a[int((n + 1) / 2)] }
{ k = $1 "," $2 "," $3; if (k != key) { flush(); key = k } n++; rate[n] = $4 + 0; p50[n] = $5 + 0; p99[n] = $6 + 0 }
END { flush() }' | sort -t, -k1,1 -k2,2 -k3,3n >"$work/medians"
{ echo "system,work,clients,per_second,p50_ms,p99_ms"; cat "$work/medians"; } >docs/performance.csv
awk -F, '
$1 == "etcd" { rate[$2, $3] = $4; p99[$2, $3] = $6 }
$1 == "ours" { row[++n] = $0 }
END {
  printf "%-14s %8s %10s %10s %8s %10s %10s\n", "work", "clients", "ours/s", "etcd/s", "ratio", "ours p99", "etcd p99"
  for (i = 1; i <= n; i++) { split(row[i], f, ","); k = f[2] SUBSEP f[3]
    printf "%-14s %8d %10d %10d %8.2f %7.1f ms %7.1f ms\n", f[2], f[3], f[4], rate[k], f[4] / rate[k], f[6], p99[k] }
}' "$work/medians"
