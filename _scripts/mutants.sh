#!/usr/bin/env bash
# The mutation gate: each patch in _scripts/mutants breaks one promise, and a test must notice. A patch begins with what it
# breaks and a line "tests: REGEXP"; it is applied to a copy of the tree, and the tests, those beside the code and those in
# test/, are run there with one seed after the other until one fails. Fails when a patch does not apply, does not build, or
# is not caught.
#
#   _scripts/mutants.sh [NAME...]      SEEDS=5 are tried with each; with SEEDS=0 it is only seen that all apply and build
#
# With QUICK=1 only the tests of the line "quick: REGEXP" are run, once: those that take seconds and need no luck. A patch
# without that line then only has to apply and build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seeds=${SEEDS:-5} line=tests
if [[ -n ${QUICK:-} ]]; then
  seeds=1 line=quick
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

if (($# > 0)); then
  patches=("${@/%/.patch}")
  patches=("${patches[@]/#/_scripts/mutants/}")
else
  patches=(_scripts/mutants/*.patch)
fi

# run_tests runs the tests of a mutant with a seed.
run_tests() {
  (cd "$copy" && ./raftstarter.test -test.timeout 10m -test.run "$tests" -sim.seed="$seed") &&
    (cd "$copy/test" && ../test.test -test.timeout 10m -test.run "$tests" -fault.seed="$seed")
}

printf '%-24s %-10s %6s %8s  %s\n' mutant result seeds seconds "caught by"
for patch in "${patches[@]}"; do
  name=$(basename "$patch" .patch)
  tests=$(sed -n "s/^$line: //p" "$patch")
  tries=$((${#tests} > 0 ? seeds : 0))
  copy=$tmp/$name
  mkdir "$copy"
  git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C "$copy"
  result=missed seed=0 caught= began=$SECONDS
  if ((tries == 0)); then build=(go build -o /dev/null .); else build=(go test -c -o . . ./test); fi
  if ! (cd "$copy" && git apply "$OLDPWD/$patch" && "${build[@]}") >"$tmp/log" 2>&1; then
    result=broken
  fi
  while [[ $result == missed ]] && ((seed < tries)); do
    seed=$((seed + 1))
    if ! run_tests >"$tmp/log" 2>&1; then
      caught=$(sed -n 's/^ *--- FAIL: \([^ ]*\).*/\1/p' "$tmp/log" | tail -n 1)
      [[ -n $caught ]] && result=caught || result=broken
    elif [[ $(grep -c 'no tests to run' "$tmp/log") == 2 ]]; then # neither here nor there
      result=broken
    fi
  done
  [[ $result == missed && $tries == 0 ]] && result=applies
  printf '%-24s %-10s %6d %8d  %s\n' "$name" "$result" "$seed" $((SECONDS - began)) "$caught"
  if [[ $result != caught && $result != applies ]]; then
    failed=1
    tail -n 20 "$tmp/log" | sed 's/^/  /'
  fi
  rm -rf "$copy"
done
exit "$failed"
