#!/usr/bin/env bash
# The mutation gate: each patch in _scripts/mutants breaks one promise, and a test must notice. A patch begins with what it
# breaks and a line "tests: REGEXP"; it is applied to a copy of the tree, and the tests are run there with one seed after
# the other until one fails. Fails when a patch does not apply, does not build, or is not caught.
#
#   _scripts/mutants.sh [NAME...]      SEEDS=5 are tried with each; with SEEDS=0 it is only seen that all apply and build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seeds=${SEEDS:-5}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

if (($# > 0)); then
  patches=("${@/%/.patch}")
  patches=("${patches[@]/#/_scripts/mutants/}")
else
  patches=(_scripts/mutants/*.patch)
fi

printf '%-24s %-10s %6s %8s  %s\n' mutant result seeds seconds "caught by"
for patch in "${patches[@]}"; do
  name=$(basename "$patch" .patch)
  tests=$(sed -n 's/^tests: //p' "$patch")
  copy=$tmp/$name
  mkdir "$copy"
  git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C "$copy"
  result=missed seed=0 caught= began=$SECONDS
  if ! (cd "$copy" && git apply "$OLDPWD/$patch" && go build -o raftstarter . && { ((seeds == 0)) || go test -c -o mutant.test .; }) >"$tmp/log" 2>&1; then
    result=broken
  fi
  while [[ $result == missed ]] && ((seed < seeds)); do
    seed=$((seed + 1))
    if ! (cd "$copy" && ./mutant.test -test.timeout 10m -test.run "$tests" -fault.seed=$seed -sim.seed=$seed) >"$tmp/log" 2>&1; then
      caught=$(sed -n 's/^ *--- FAIL: \([^ ]*\).*/\1/p' "$tmp/log" | tail -n 1)
      [[ -n $caught ]] && result=caught || result=broken
    elif grep -q 'no tests to run' "$tmp/log"; then
      result=broken
    fi
  done
  [[ $result == missed && $seeds == 0 ]] && result=applies
  printf '%-24s %-10s %6d %8d  %s\n' "$name" "$result" "$seed" $((SECONDS - began)) "$caught"
  if [[ $result != caught && $result != applies ]]; then
    failed=1
    tail -n 20 "$tmp/log" | sed 's/^/  /'
  fi
  rm -rf "$copy"
done
exit "$failed"
