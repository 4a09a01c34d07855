#!/usr/bin/env bash
# Installs the service on the Kubernetes that kubectl's current context names, in a namespace of its own that is deleted at
# the end, and shows with timings what it lives through there. Needs kubectl, curl and Go; the cluster must know the image
# raftstarter:latest. Requests go to the Service's own address where that can be reached from here, and else through the API
# server, which picks a ready pod for each request; kubectl port-forward would stay with one pod.
#
#   _scripts/k8s-test.sh      VIA=proxy goes through the API server in any case
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

label=app.kubernetes.io/name=raftstarter
names=(raftstarter-0 raftstarter-1 raftstarter-2) # of the pods that are to have all data
namespace=raftstarter-test-$RANDOM
tmp=$(mktemp -d)
background=()

cleanup() {
  ((${#background[@]} == 0)) || kill "${background[@]}" 2>/dev/null || true
  kubectl delete namespace "$namespace" --ignore-not-found
  rm -rf "$tmp"
}

now() { echo "${EPOCHREALTIME/[^0-9]/}"; } # in microseconds
began=$(now)
say() { printf '%6.1f s  %s\n' "$((($(now) - began) / 100000))e-1" "$*"; }
die() {
  say "FAILED: $*"
  kubectl get pods -o wide || true
  kubectl logs -l "$label" --prefix --tail=20 || true
  exit 1
}

# took SECONDS START WHAT says how long WHAT has taken since START, and fails when that is more than SECONDS.
took() {
  local micros=$(($(now) - $2))
  say "$3 after $(printf '%.1f' "$((micros / 100000))e-1") s (at most $1)"
  ((micros <= $1 * 1000000)) || die "that is too long"
}

# until_true SECONDS WHAT COMMAND... waits until COMMAND succeeds.
until_true() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < end)) || die "not in time: $what"
    sleep 0.2
  done
}

uids() { kubectl get pods -l "$label" -o 'jsonpath={.items[*].metadata.uid}'; } # in the order of the pods' names
field() { kubectl get pod "$1" -o "jsonpath=$2"; }

# renewed POD UID tells whether POD is another than that with UID, and ready.
renewed() {
  local state
  state=$(field "$1" '{.metadata.uid} {.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null) || return 1
  [[ $state == *" True" && $state != "$2 "* ]]
}

http() { curl -fsS -m 15 --retry 10 --retry-delay 1 --retry-connrefused "$@"; }
pod_url() { # of a pod, by its name
  if [[ $via == proxy ]]; then
    echo "$api/pods/$1:11000/proxy"
  else
    echo "http://$(field "$1" '{.status.podIP}'):11000"
  fi
}
leader() { curl -fsS -m 5 "$service/status" | sed -n 's/.*"leader":"\([^"]*\)".*/\1/p'; }

start_load() {
  "$tmp/load" "$service" <>"$tmp/lines" >"$tmp/load.out" 2>&1 &
  load=$!
  background+=("$load")
  sleep 2
}

stop_load() {
  echo stop >"$tmp/lines"
  until_true 30 "the load has stopped" test -s "$tmp/load.out"
}

check_load() { # looks for what was written, through every pod
  local pod urls=() code=0
  for pod in "${names[@]}"; do urls+=("$(pod_url "$pod")"); done
  echo "${urls[*]}" >"$tmp/lines"
  wait "$load" || code=$?
  unset 'background[-1]'
  say "load: $(<"$tmp/load.out")"
  ((code == 0)) || die "the load has seen what it should not"
  say "every pod has every write that was acknowledged"
}

# list_pods N writes the first N pods into the list of peers.yaml, and applies it.
list_pods() {
  local i
  sed -i '/^    raftstarter-/d' k8s/peers.yaml
  for ((i = 0; i < $1; i++)); do
    echo "    raftstarter-$i@raftstarter-$i.raftstarter-headless:12000" >>k8s/peers.yaml
  done
  kubectl apply -f k8s/ | grep -v unchanged
}

run_pods() { # N: as many replicas
  sed -i "s/^  replicas: [0-9]*/  replicas: $1/" k8s/statefulset.yaml
  kubectl apply -f k8s/ | grep -v unchanged
}

# members PODS tells whether exactly these are the members that vote, as raftstarter-0 sees it, and nothing is left to do.
members() {
  local list
  list=$(printf ',"%s"' "$@")
  curl -fsS -m 5 "$(pod_url raftstarter-0)/status" >"$tmp/status" && grep -qF "\"actual\":[${list#,}],\"waits_for\":\"\"" "$tmp/status"
}

waits_for() { sed -n 's/.*"waits_for":"\(.*\)"}.*/\1/p' "$tmp/status"; }

# backup URL FILE saves all keys that the pod has.
backup() {
  http -o "$2" "$1/backup?consistency=stale"
  [[ $(tail -n 1 "$2") == '{}' ]] || die "the backup is cut short"
}

evict() { # as kubectl drain does; the answer is in $tmp/out
  kubectl create --raw "/api/v1/namespaces/$namespace/pods/$1/eviction" -f - >"$tmp/out" 2>&1 \
    <<<"{\"apiVersion\":\"policy/v1\",\"kind\":\"Eviction\",\"metadata\":{\"name\":\"$1\"}}"
}

trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
go -C _scripts/k8s build -o "$tmp/load" .
mkfifo "$tmp/lines"
cp -r k8s _scripts "$tmp" # to edit the manifests as a user does
cd "$tmp"

# A kubeconfig of our own, whose namespace is ours; everything below uses kubectl as its user would.
kubectl config view --raw --minify --flatten >"$tmp/kubeconfig"
export KUBECONFIG=$tmp/kubeconfig
kubectl config set-context --current --namespace="$namespace" >/dev/null
kubectl create namespace "$namespace"
trap cleanup EXIT
kubectl label namespace "$namespace" pod-security.kubernetes.io/enforce=restricted >/dev/null

say "== install"
start=$(now)
_scripts/install.sh
took 60 "$start" "all pods are ready"
before=$(uids)
_scripts/install.sh >"$tmp/out"
[[ $(uids) == "$before" ]] || die "a second install has replaced pods: $(<"$tmp/out")"

service=http://$(kubectl get service raftstarter -o 'jsonpath={.spec.clusterIP}'):11000
via=${VIA:-direct}
if [[ $via == proxy ]] || ! curl -s -m 5 --retry 5 --retry-delay 1 --retry-connrefused -o "$tmp/out" "$service/livez"; then
  via=proxy
  kubectl proxy --port=0 >"$tmp/proxy" &
  background+=($!)
  until_true 10 "kubectl proxy" grep -q 127.0.0.1 "$tmp/proxy"
  api=http://$(grep -o '127.0.0.1:[0-9]*' "$tmp/proxy")/api/v1/namespaces/$namespace
  service=$api/services/raftstarter:http/proxy
fi
say "requests go to $service"

say "== a write through the Service is read from every pod"
http -X PUT -d '"kept"' "$service/key/first"
for pod in "${names[@]}"; do
  answer=$(http "$(pod_url "$pod")/key/first")
  [[ $answer == '{"first":"kept"}' ]] || die "$pod answers $answer"
  say "$pod: $answer"
done

say "== the leader's pod is deleted, under load"
start_load
old=$(leader) uid=$(field "$old" '{.metadata.uid}') ip=$(field "$old" '{.status.podIP}')
start=$(now)
kubectl delete pod "$old" --wait=false
other_leader() { local id; id=$(leader) && [[ -n $id && $id != "$old" ]]; }
until_true 10 "another leader" other_leader
took 10 "$start" "another leader, $(leader),"
until_true 60 "$old is ready again" renewed "$old" "$uid"
took 60 "$start" "$old is ready again, followed from $ip to $(field "$old" '{.status.podIP}'),"
stop_load
check_load

say "== all pods are deleted at once, by force"
start_load
stop_load
read -ra gone <<<"$(uids)"
start=$(now)
kubectl delete pod "${names[@]}" --grace-period=0 --force 2>/dev/null
for i in 0 1 2; do
  until_true 60 "${names[i]} is ready again" renewed "${names[i]}" "${gone[i]}"
done
took 60 "$start" "all pods are ready again"
check_load

say "== rolling restart, under load"
start_load
start=$(now)
kubectl rollout restart statefulset/raftstarter
kubectl rollout status statefulset/raftstarter --timeout=3m >"$tmp/out" || die "$(<"$tmp/out")"
took 120 "$start" "all pods are restarted"
stop_load
check_load

say "== drains respect the budget"
uid=$(field raftstarter-0 '{.metadata.uid}')
until_true 30 "raftstarter-0 can be evicted" evict raftstarter-0 # the budget is counted a moment after the restart
say "raftstarter-0 is evicted"
if evict raftstarter-1; then die "raftstarter-1 is evicted, too"; fi
say "raftstarter-1 is not: $(<"$tmp/out")"
until_true 60 "raftstarter-0 is ready again" renewed raftstarter-0 "$uid"
until_true 30 "raftstarter-1 can be evicted" evict raftstarter-1
say "raftstarter-0 is ready again, and raftstarter-1 is evicted"

say "== who is not of the cluster reaches the HTTP port and not the Raft port"
# The image's own health check is the client: nothing else is sure to be there. It gives up after three seconds.
has_ended() { [[ $(field "$1" '{.status.phase}') == @(Succeeded|Failed) ]]; }
stranger() { # stranger NAME PORT: asks that port of raftstarter-0 and prints how that ends
  kubectl apply -f - <<POD >/dev/null
apiVersion: v1
kind: Pod
metadata:
  name: $1
spec:
  restartPolicy: Never
  enableServiceLinks: false
  containers:
    - name: stranger
      image: raftstarter:latest
      imagePullPolicy: IfNotPresent
      args: [--healthcheck]
      env: [{name: HTTP_ADDR, value: raftstarter-0.raftstarter-headless}, {name: HTTP_PORT, value: "$2"}, {name: RAFT_PORT, value: "1"}]
      securityContext: {runAsNonRoot: true, runAsUser: 65532, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
POD
  until_true 30 "the pod $1 has ended" has_ended "$1"
  echo "$(field "$1" '{.status.phase}') $(kubectl logs "$1")"
}
until_true 60 "raftstarter-0 is ready" renewed raftstarter-0 "$uid"
answer=$(stranger http-stranger 11000)
[[ $answer == Succeeded* ]] || die "the HTTP port does not answer: $answer"
answer=$(stranger raft-stranger 12000)
case $answer in
  *"deadline exceeded"* | *timeout*) say "HTTP answers, Raft does not: $answer" ;;
  *) say "NOT ENFORCED: the network of this cluster takes no notice of NetworkPolicies: $answer" ;;
esac

say "== from three pods to five, under load"
start_load
start=$(now)
list_pods 5
told() { members 0; [[ $(waits_for) == *"raftstarter-4"* ]]; } # not yet: the pods are not there
until_true 180 "the leader waits for raftstarter-4" told
took 180 "$start" "the list is with the pods, and the leader waits: $(waits_for)"
start=$(now)
run_pods 5
kubectl rollout status statefulset/raftstarter --timeout=3m >"$tmp/out" || die "$(<"$tmp/out")"
took 120 "$start" "five pods are ready"
names+=(raftstarter-3 raftstarter-4)
until_true 10 "all five vote" members "${names[@]}"
sleep 5
stop_load
check_load

say "== from five pods to three, under load, and the leader is one of those that leave"
# A leader that stops prefers the first of equals. So the first two stay away, by a quota, until one of the last leads.
last_leads() { [[ $(curl -fsS -m 5 "$(pod_url raftstarter-4)/status") == *'"leader":"raftstarter-'[34]* ]]; }
read -ra gone <<<"$(uids)"
kubectl create quota no-more --hard=pods=3
kubectl delete pod raftstarter-0 raftstarter-1
last_leads || kubectl delete pod raftstarter-2 --wait=false
until_true 30 "raftstarter-3 or raftstarter-4 leads" last_leads
kubectl delete quota no-more
for i in 0 1; do
  until_true 120 "raftstarter-$i is ready again" renewed "raftstarter-$i" "${gone[i]}"
done
kubectl rollout status statefulset/raftstarter --timeout=1m >"$tmp/out" || die "$(<"$tmp/out")"
names=(raftstarter-0 raftstarter-1 raftstarter-2)
say "$(leader) leads"
[[ $(leader) == raftstarter-[34] ]] || say "NOT TRIED: the leader is none of those that leave"
start_load
start=$(now)
list_pods 3
until_true 180 "three pods vote" members "${names[@]}"
took 180 "$start" "three pods vote, and $(leader) leads"
start=$(now)
run_pods 3
ended() { [[ -z $(kubectl get pod raftstarter-3 raftstarter-4 --ignore-not-found -o name) ]]; }
until_true 60 "the other two have ended" ended
took 60 "$start" "the other two have ended"
sleep 5
stop_load
check_load

say "== and to five again, with the volumes that were kept; list and replicas at once"
start_load
start=$(now)
list_pods 5
run_pods 5
names+=(raftstarter-3 raftstarter-4)
until_true 180 "all five vote" members "${names[@]}"
took 180 "$start" "all five vote"
kubectl rollout status statefulset/raftstarter --timeout=1m >"$tmp/out" || die "$(<"$tmp/out")"
stop_load
check_load

say "== back to three; the volumes that nobody uses are deleted"
names=(raftstarter-0 raftstarter-1 raftstarter-2)
list_pods 3
until_true 180 "three pods vote" members "${names[@]}"
run_pods 3
until_true 60 "the other two have ended" ended
kubectl delete pvc state-raftstarter-3 state-raftstarter-4

say "== a majority of the volumes is lost"
backup "$(pod_url raftstarter-0)" "$tmp/before"
start=$(now)
kubectl delete pvc state-raftstarter-1 state-raftstarter-2 --wait=false
kubectl delete pod raftstarter-1 raftstarter-2 --grace-period=0 --force 2>/dev/null
advice() { curl -sS -m 5 "$(pod_url "$1")/readyz" >"$tmp/advice" && grep -q "has lost its state, .*save its backup" "$tmp/advice"; }
until_true 120 "raftstarter-1 says what to do" advice raftstarter-1
until_true 30 "raftstarter-0 says what to do" advice raftstarter-0
took 120 "$start" "the advice is there: $(<"$tmp/advice")"
best=$(sed -n 's/.*Node \([^ ]*\) has the most complete log.*/\1/p' "$tmp/advice")
if answer=$(curl -fsS -m 20 -X PUT -d 1 "$(pod_url raftstarter-0)/key/late" 2>&1); then die "a write is taken: $answer"; fi
backup "$(pod_url "$best")" "$tmp/backup"
_scripts/uninstall.sh
kubectl delete pvc -l "$label"
_scripts/install.sh
if [[ $via == direct ]]; then service=http://$(kubectl get service raftstarter -o 'jsonpath={.spec.clusterIP}'):11000; fi
while IFS= read -r line; do
  printf '%s' "$line" | http --data-binary @- "$service/key"
done <"$tmp/backup"
for pod in "${names[@]}"; do
  http "$(pod_url "$pod")/key/first" >"$tmp/out" # linearizable: from here on the pod has all
  backup "$(pod_url "$pod")" "$tmp/$pod"
  cmp "$tmp/$pod" "$tmp/before" || die "$pod has other data than there was before"
done
took 240 "$start" "all $(grep -o '":' "$tmp/backup" | wc -l) keys are restored, and every pod has them,"

say "== uninstall keeps the data, and install finds it again"
_scripts/uninstall.sh
[[ $(kubectl get pvc -l "$label" -o name | wc -l) == 3 ]] || die "the volumes are gone"
_scripts/install.sh
if [[ $via == direct ]]; then service=http://$(kubectl get service raftstarter -o 'jsonpath={.spec.clusterIP}'):11000; fi
answer=$(http "$service/key/first")
[[ $answer == '{"first":"kept"}' ]] || die "the Service answers $answer"
say "the Service answers $answer"
say "All is well."
