#!/usr/bin/env bash
# Builds the image and tries it with Docker: what is in it, one node, and three nodes on a private network, of which one is
# stopped, one cut off, and all replaced. All that it makes is named after it, and removed in the end.
#
#   _scripts/image-test.sh [OPTION OF docker build...]
#
# With STAND_IN=1 the golang image is made of the Go that is installed here, unless Docker has that image: for a machine that
# reaches no registry.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=raftstarter-test-$$
image=$name:image build=$name:build
base=golang:$(sed -n 's/^ARG GO_VERSION=//p' Dockerfile)
made_base=
tmp=$(mktemp -d)

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
die() {
  echo "FAILED: $*" >&2
  exit 1
}

clean_up() {
  local code=$? id
  set +e # what cannot be removed does not keep the rest
  for id in $(docker ps -aq --filter "name=^$name-"); do
    ((code == 0)) || { docker inspect -f '--- {{.Name}} {{json .State}}' "$id" && docker logs --tail 20 "$id"; } >&2
    docker rm -f "$id"
  done
  for id in $(docker volume ls -q --filter "name=^$name-"); do
    docker volume rm "$id"
  done
  for id in $(docker network ls -q --filter "name=^$name$"); do
    docker network rm "$id"
  done
  docker image rm "$image" "$build" $made_base 2>&1
  rm -rf "$tmp"
} >/dev/null

# stand_in makes what the Dockerfile needs of the golang image: Go, a shell, mkdir, and CA certificates.
stand_in() {
  local root=$tmp/root libraries
  [[ $base == "golang:$(go env GOVERSION | sed 's/^go//')" ]] || die "the Dockerfile builds with $base, but $(go env GOVERSION) is installed"
  libraries=$(ldd /bin/sh /bin/mkdir | grep -o '/[^ :]* (' | tr -d '(' | sort -u)
  mkdir -p "$root/usr/local" "$root/tmp"
  cp -a "$(go env GOROOT)" "$root/usr/local/go"
  cp -L --parents /bin/sh /bin/mkdir $libraries /etc/ssl/certs/ca-certificates.crt "$root"
  tar -C "$root" -cf - . | docker import --change 'ENV PATH=/usr/local/go/bin:/bin GOTOOLCHAIN=local' - "$base" >/dev/null
  made_base=$base
  rm -rf "$root"
}

# create NODE [VARIABLE=VALUE...] makes a container with as few rights as there can be. Its port 11000 is published by way
# of Docker's default network, so it can be reached from here when the node is cut off from its peers.
create() {
  docker create --name "$name-$1" --read-only --cap-drop ALL --security-opt no-new-privileges \
    -p 127.0.0.1::11000 -v "$name-$1:/data" -e "NODE_ID=$1" "${@/#/--env=}" "$image" >/dev/null
}

ask() { curl -sS -m 15 "http://$(docker port "$name-$1" 11000/tcp)$2" "${@:3}"; } # NODE PATH [OPTION OF curl...]
ready() { ask "$1" /readyz -f -o /dev/null; }
put() { ask "$1" "/key/$2" -f -X PUT -d "$3"; } # NODE KEY VALUE

# get KEY VALUE NODE... is true when a GET through each of the nodes answers the value.
get() {
  local node
  for node in "${@:3}"; do
    [[ $(ask "$node" "/key/$1") == "{\"$1\":$2}" ]] || return 1
  done
}

# within SECONDS COMMAND... tries the command until it succeeds.
within() {
  local end=$((SECONDS + $1))
  until "${@:2}" 2>"$tmp/err"; do
    ((SECONDS < end)) || { cat "$tmp/err" >&2; die "not within $1 s: ${*:2}"; }
    sleep 0.2
  done
}

start() { docker start "${@/#/$name-}" >/dev/null; }

# stop NODE... sends SIGTERM to each, and wants exit code 0 before Docker's ten seconds are over and it kills.
stop() {
  local node
  docker stop "${@/#/$name-}" >/dev/null
  for node in "$@"; do
    [[ $(docker inspect -f '{{.State.ExitCode}}' "$name-$node") == 0 ]] || die "$node did not end well on SIGTERM"
  done
}

command -v docker >/dev/null || die "docker is not installed"
docker version --format 'Docker {{.Server.Version}}' || die "the Docker daemon does not answer"
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -n ${STAND_IN:-} ]] && ! docker image inspect "$base" >/dev/null 2>&1; then
  stand_in
  say "made $base of the Go that is installed here"
fi
# The build stage has a tag too, so that clean_up can name it.
for options in "--target build -t $build" "-t $image"; do
  docker build $options --build-arg VERSION=v1.2.3 "$@" . >"$tmp/log" 2>&1 || { cat "$tmp/log"; die "the image does not build"; }
done

field() { docker image inspect -f "$1" "$image"; }
size=$(field '{{.Size}}')
((size < 20000000)) || die "the image has $size bytes"
[[ $(field '{{.Config.User}}') =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || die "the user must be a number, and not root's"
for label in "title Raft Starter" "description A highly available" "version v1.2.3"; do
  [[ $(field "{{index .Config.Labels \"org.opencontainers.image.${label%% *}\"}}") == "${label#* }"* ]] || die "the image lacks the label $label"
done
[[ $(docker run --rm "$image" --version) == v1.2.3 ]] || die "--version does not answer v1.2.3"
[[ $(docker run --rm "$image" --help) == "usage: raftstarter"* ]] || die "--help does not answer"
say "built: $size bytes, user $(field '{{.Config.User}}')"

healthy() { [[ $(docker inspect -f '{{.State.Health.Status}}' "$name-node") == healthy ]]; }
create node
start node
within 30 ready node
put node color '"blue"'
within 30 healthy
if docker exec -e HTTP_PORT=1 "$name-node" /raftstarter --healthcheck 2>/dev/null; then
  die "the health check is content where nobody listens"
fi
stop node
docker rm "$name-node" >/dev/null
create node
start node
within 30 get color '"blue"' node
docker rm -f "$name-node" >/dev/null
say "one node: healthy, ended by SIGTERM, and its data is there in another container"

nodes=(node1 node2 node3)
join() { docker network connect --alias "$1" "$name" "$name-$1"; }
leave() { docker network disconnect "$name" "$name-$1"; }

start_cluster() { # NODE..., in this order
  local node
  for node in "$@"; do
    create "$node" PEERS=node1@node1:12000,node2@node2:12000,node3@node3:12000
    join "$node"
    start "$node"
  done
  for node in "$@"; do
    within 60 ready "$node"
  done
}

address() { docker inspect -f "{{(index .NetworkSettings.Networks \"$name\").IPAddress}}" "$name-$1"; }

find_leader() { # sets leader, and the two others
  local node
  leader=$(ask node1 /status -o /dev/null -w '%header{raft-leader}') others=()
  for node in "${nodes[@]}"; do
    [[ $node == "$leader" ]] || others+=("$node")
  done
  ((${#others[@]} == 2)) || die "node1 says that $leader leads"
}

docker network create --internal "$name" >/dev/null
start_cluster "${nodes[@]}"
for node in "${nodes[@]}"; do
  put "$node" "by-$node" 1
  get "by-$node" 1 "${nodes[@]}" || die "not every node has what was written through $node"
done
say "three nodes: what is written through any is read through all"

find_leader
stop "$leader"
within 10 put "${others[0]}" stopped 1
get stopped 1 "${others[@]}" || die "a node lacks what was written while $leader was stopped"
start "$leader"
within 30 get stopped 1 "$leader"
say "the leader stopped: the others go on, and it follows when it is back"

within 30 ready "$leader"
find_leader
leave "$leader"
within 15 put "${others[0]}" cut 1
get cut 1 "${others[@]}" || die "a node lacks what was written while $leader was cut off"
[[ $(ask "$leader" '/key/cut?consistency=stale') == '{"cut":null}' ]] || die "$leader was not cut off"
[[ $(ask "$leader" /key/cut -o /dev/null -w '%{http_code}') == 503 ]] || die "$leader, which is cut off, answers a linearizable read"
join "$leader"
within 30 get cut 1 "$leader"
say "the leader cut off: the others go on, it answers only stale reads, and it follows when it is back"

declare -A before
for node in "${nodes[@]}"; do
  before[$node]=$(address "$node")
done
stop "${nodes[@]}"
docker rm "${nodes[@]/#/$name-}" >/dev/null
start_cluster node2 node3 node1
for node in "${nodes[@]}"; do
  [[ $(address "$node") != "${before[$node]}" ]] || die "$node has the IP that it had, so nothing was tried"
  for key in by-node1 by-node2 by-node3 stopped cut; do
    get "$key" 1 "$node" || die "$node has lost $key"
  done
done
put node1 replaced 1
get replaced 1 "${nodes[@]}" || die "not every node has what was written last"
say "all replaced, with new IPs: nothing is lost"
