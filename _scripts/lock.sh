#!/usr/bin/env bash
# Runs a command while it holds a lock: of all who ask for the same NAME, one at a time runs its command.
#
#   _scripts/lock.sh NAME LEASE_SECONDS COMMAND...
#
# The lock is the key locks/NAME of the service at URL (default http://localhost:11000). It is taken with If-None-Match: *,
# renewed three times a lease with If-Match, and released with If-Match. Whoever waits takes it over after seeing one ETag
# for a whole lease of their own clock. A holder that cannot renew ends its command before that. A holder that is paused
# cannot: so what the command writes to must refuse old tokens. LOCK_TOKEN in the command's environment is the ETag with
# which the lock was taken, a number that is larger with each holder. docs/locks.md has an example. It needs bash and
# curl 7.84.
#
# Exits with the command's status, or with 75 when the lock was lost and the command was ended.
set -uo pipefail

if (($# < 3)) || ! [[ $1 =~ ^[A-Za-z0-9._/-]+$ && $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NAME LEASE_SECONDS COMMAND...   (NAME of letters, digits, . _ / and -; LEASE_SECONDS at least 1)" >&2
  exit 2
fi
key=${URL:-http://localhost:11000}/key/locks/$1
lease=$(($2 * 1000)) # milliseconds, as all times here
shift 2
patience=$(printf '%d.%03d' $((lease / 6000)) $((lease / 6 % 1000))) # with an answer, in seconds
me="\"$(uname -n)-$$-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')\""  # the key's value; no other holder has it

# now sets $now, by a clock that nobody sets where there is one.
now() {
  local up
  if read -r up _ 2>/dev/null </proc/uptime; then now=$((10#${up/./} * 10)); else now=$(($(date +%s) * 1000)); fi
}

# ask METHOD [CURL OPTIONS] sends a request and sets $status (000: no answer), $tag and $value.
ask() {
  local answer
  answer=$(curl -s --path-as-is -m "$patience" -X "$@" -w '\n%{http_code} %header{etag}' "$key")
  value=${answer%$'\n'*}
  read -r status tag <<<"${answer##*$'\n'}"
}

# take CONDITION takes or renews the lock. On success it sets $held, the ETag, and $sent, when our lease began at the
# latest.
take() {
  local began
  now
  began=$now
  ask PUT -H "$1" -d "$me"
  [[ $status == 200 ]] && held=$tag sent=$began
}

# look reads the lock and says whether it is ours: an answer to an earlier request may have been lost.
look() {
  ask GET
  [[ $status == 200 && $value == *":$me}" ]]
}

# release releases the lock. It looks first: a signal can come between an answer and its reading, and $held is old then.
release() {
  look && ask DELETE -H "If-Match: $tag"
}

# end ends the command and all of its process group.
end() {
  local i
  kill -TERM -- "-$child" 2>/dev/null
  for ((i = 0; i < 10; i++)); do
    kill -0 -- "-$child" 2>/dev/null || break
    sleep "0.$(printf '%03d' $((lease < 10000 ? lease / 100 : 100)))"
  done
  kill -KILL -- "-$child" 2>/dev/null
  wait "$child" 2>/dev/null
}

child='' held='' sent=0 seen='' since=0 told=''
trap '[[ -z $child ]] || end; release; exit 143' TERM INT

while [[ -z $held ]]; do
  now
  if [[ -z $seen ]]; then
    take 'If-None-Match: *' && break
  elif ((now - since > lease)); then
    take "If-Match: $seen" && break
  fi
  if look; then
    take "If-Match: $tag" # for a lease whose beginning we know
  elif [[ $status == 200 && $tag != "$seen" ]]; then # its holder is alive, or there is none
    now
    seen=$tag since=$now
  fi
  [[ -n $held || -z $seen ]] || sleep 0.1
  if [[ $status != 200 ]]; then
    if [[ -z $told && $status != 412 && $status != 5* ]]; then
      told=1
      echo "$0: $key answers ${status/000/nothing}; trying on" >&2
    fi
    sleep 0.1
  fi
done
export LOCK_TOKEN=${held//\"/}

set -m # gives the command a process group of its own
"$@" &
child=$!
set +m
while kill -0 "$child" 2>/dev/null; do
  now
  if ((now - sent < lease / 3)); then
    sleep 0.05
    continue
  fi
  take "If-Match: $held" && continue
  now
  if ((now - sent < lease * 2 / 3)); then
    if [[ $status != 412 ]]; then
      sleep 0.05
      continue
    fi
    if look; then
      held=$tag
      continue
    fi
    [[ $status == 200 ]] || continue
  fi
  echo "$0: the lock was lost, or could not be renewed in time; the command is ended" >&2
  held=''
  end
  exit 75
done
wait "$child"
code=$?
release
exit "$code"
