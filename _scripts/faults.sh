#!/usr/bin/env bash
# The campaign of the fault suite: every class of faults on every cluster it applies to, with one seed after another, and
# then all classes mixed. Prints a table; exits 1 if anything failed, and says where the log is, or if one in a hundred
# writes came later than 3 s after the leader's kill.
# usage: _scripts/faults.sh [seconds [first seed [flags of the test...]]]    such as: _scripts/faults.sh 3600 1 -fault.clock
# CLASSES="wipe mixed" _scripts/faults.sh ... runs these classes only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-600} seed=${2:-1}
flags=("${@:3}")
out=$(mktemp -d)
go test -c -o "$out/test" ./test
cd test # where the tests build the service from
all=$({ "$out/test" -test.run 'TestFaults$' -fault.class=none || true; } | sed -n 's/.* is none of: //p')
classes=${CLASSES:-$all}
count=$(wc -w <<<"$classes")
seeds=$((seconds / count / 40)) # a run should not be much shorter than 40 s, of which some are spent before and after
seeds=$((seeds > 0 ? seeds : 1))
each=$((seconds / count / seeds - 12))
each=$((each > 5 ? each : 5))
failed=0

for ((last = seed + seeds; seed < last; seed++)); do
  for class in $classes; do
    log=$out/$class-$seed.log
    if ! "$out/test" -test.v -test.timeout 30m -test.run 'TestFaults$' -fault.class="$class" -fault.seed="$seed" \
      -fault.time="${each}s" -fault.pace=10ms "${flags[@]}" >"$log" 2>&1; then
      echo "FAILED: -fault.class=$class -fault.seed=$seed -fault.time=${each}s; see $log"
      failed=1
    fi
  done
done

# A FAULTS line is name=value pairs. The first awk makes records of it: one of sums, and one of each recovery, which sort
# puts in order.
grep -h ' FAULTS ' "$out"/*.log | awk '{
  for (i = 1; i <= NF; i++) if (split($i, pair, "=") == 2) v[pair[1]] = pair[2]
  print v["class"], "sum", v["faults"], v["ops"], v["violations"], v["ready"], v["lines"], v["gaps"]
  n = split(v["recovery"], took, ",")
  for (i = 1; i <= n; i++) print v["class"], "took", took[i]
}' | sort -k1,1 -k2,2 -k3,3n | awk '
function percentile(p) { return n ? took[int((n * p + 99) / 100)] : "-" }
function row() {
  printf "%-18s %5d %7d %9d %7d %5d %11d %9s ms %6s ms %6s ms %6d ms\n", class, runs, faults, ops, lines, gaps, violations,
    percentile(50), percentile(99), percentile(100), ready
  if (class == "kill-leader" && n && percentile(99) > 3000) late = 1
}
BEGIN {
  printf "%-18s %5s %7s %9s %7s %5s %11s %12s %9s %9s %9s\n", "class", "runs", "faults", "checked", "in feed", "gaps",
    "violations", "recovery p50", "p99", "max", "ready max"
}
$1 != class { if (class) row(); class = $1; runs = faults = ops = lines = gaps = violations = ready = n = 0 }
$2 == "sum" {
  runs++; faults += $3; ops += $4; violations += $5; lines += $7; gaps += $8; if ($6 > ready) ready = $6
  all["runs"]++; all["faults"] += $3; all["ops"] += $4; all["v"] += $5; all["lines"] += $7; all["gaps"] += $8
}
$2 == "took" { took[++n] = $3 }
END {
  row()
  printf "%-18s %5d %7d %9d %7d %5d %11d\n", "all", all["runs"], all["faults"], all["ops"], all["lines"], all["gaps"], all["v"]
  if (late) print "FAILED: kill-leader: p99 is over 3 s"
  exit late
}' || failed=1
exit "$failed"
