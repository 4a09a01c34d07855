#!/usr/bin/env bash
# Checks the alert rules in k8s/variants/monitoring/: that Prometheus takes them, and that each fires when it should
# (alerts_test.yaml). Needs promtool, which comes with Prometheus.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rules=k8s/variants/monitoring/prometheusrule.yaml
tests=_scripts/alerts_test.yaml
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

sed '1,/^spec:/d; s/^  //' "$rules" >"$tmp/rules.yaml" # what the operator wraps is a rules file of Prometheus' own
cp "$tests" "$tmp"
promtool check rules "$tmp/rules.yaml"
for alert in $(awk '$2 == "alert:" { print $3 }' "$tmp/rules.yaml"); do
  grep -q "alertname=\"$alert\"" "$tests" || { echo "$tests never has $alert fire"; exit 1; }
done
promtool test rules "$tmp/${tests##*/}"
