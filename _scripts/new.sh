#!/usr/bin/env bash
# Makes a project of your own from this one, with the counters of _examples as its state machine to start from.
# usage: _scripts/new.sh DIRECTORY MODULE         such as: _scripts/new.sh ../myservice example.com/myservice
# The last element of the module's path, without what is neither letter nor digit, becomes the name of the binary and the
# prefix of the metrics.
set -euo pipefail

die() {
  echo "new.sh: $*" >&2
  exit 1
}

(($# == 2)) || die "usage: _scripts/new.sh DIRECTORY MODULE, such as: _scripts/new.sh ../myservice example.com/myservice"
target=$1 module=$2
[[ ! -e $target && ! -L $target ]] || die "$target exists already: name a directory that does not"
[[ -d $(dirname -- "$target") ]] || die "there is no directory $(dirname -- "$target")"
element='[a-zA-Z0-9_~-][a-zA-Z0-9._~-]*'
[[ $module =~ ^$element(/$element)*$ && $module != *. && $module != *./* ]] ||
  die "$module is no module path: use one such as example.com/myservice"
name=$module
[[ ! ${name##*/} =~ ^v[0-9]+$ || $name != */* ]] || name=${name%/*} # a major version, as in example.com/myservice/v2
name=${name##*/}
name=${name//[^a-zA-Z0-9]/}
name=${name,,}
[[ ! -d $(dirname -- "${BASH_SOURCE[0]}")/../$name && $name != state ]] ||
  die "$module would give the binary the name of a directory, $name: use another such as example.com/my$name"
[[ $name =~ ^[a-z] ]] || die "$module does not end in a name that begins with a letter: use one such as example.com/myservice"

target=$(cd "$(dirname -- "$target")" && pwd)/$(basename -- "$target")
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

# What is left out: the key-value service with its tests and documents, and how this project itself is tested and measured.
left_out='^(fsm|http|list|kv|json|fuzz_http|example|txn|backup|follow|lock)_test\.go$|^(fsm|http|txn|backup)\.go$|^test/[^/]*$'
left_out+='|^\.ci/|^_examples/|^_scripts/(mutants|k8s/|new\.sh|lock\.sh|mutants\.sh|faults\.sh|bench\.sh|plot\.sh|image-test\.sh|k8s-test\.sh)'
left_out+='|^(README|CHANGELOG|CONTRIBUTING|PERFORMANCE|RELIABILITY)\.md$|^docs/(api\.md|locks\.md|sizing\.md|performance\.)'

git rev-parse --git-dir >/dev/null || die "this is no clone of the project: git clone it, and run new.sh there"
mkdir -- "$target"
git ls-files -z | grep -zvE "$left_out" | while IFS= read -r -d '' file; do
  [[ -f $file ]] || continue # deleted, and not committed yet
  mkdir -p -- "$target/$(dirname -- "$file")"
  cp -p -- "$file" "$target/$file"
done
cp -- _examples/counters/*.go "$target"

cd -- "$target"
title=${name^}
find . -type f ! -name LICENSE -print0 | xargs -0 sed -i "
  s|\"raftstarter/|\"@MODULE@/|g
  s|raftstarter|$name|g
  s|RAFTSTARTER|${name^^}|g
  s/Raft Starter\|Raftstarter/$title/g
  s|@MODULE@|$module|g"
sed -i 's|\[RELIABILITY.md\](RELIABILITY.md)|RELIABILITY.md of the Raft Starter|' DESIGN.md
sed -i '/^ci:/,$d' Makefile
sed -i 's/key-value service in one binary: JSON values/service in one binary: counters/
  /curl -X POST -d .{"greeting/d; /curl -X DELETE localhost/d
  s|curl localhost:11000/key/greeting|curl -d 1 localhost:11000/counter/visits|' main.go
sed -i 's/key-value service: JSON over HTTP/service: counters over HTTP/' Dockerfile
sed -i '1a\
\
This page was written for a key-value service: where it restores with `POST /key`, use the API of http.go.' docs/operations.md
cat >README.md <<EOF
# $title

Counters over HTTP, replicated with Raft. Any node answers any request.

    go run .
    curl -d 1 localhost:11000/counter/visits
    curl localhost:11000/counters

## Three nodes

\`go build -o ./tmp/app && go tool goreman -exit-on-stop=false start\` runs them. They answer on ports 11001 to 11003.

## More

- [docs/fork.md](docs/fork.md): how to change the state machine (fsm.go) and its HTTP API (http.go)
- [docs/configuration.md](docs/configuration.md), [docs/operations.md](docs/operations.md), [docs/metrics.md](docs/metrics.md)
- [DESIGN.md](DESIGN.md): how the rest works, and why

Made from the Raft Starter; see LICENSE.
EOF
go mod edit -module "$module"
go mod tidy
gofmt -w .
go vet ./...
echo "$target is $module. Next: cd $target && go test ./... && go run ."
