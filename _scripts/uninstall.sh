#!/usr/bin/env bash
# Takes the service, whatever its variant, out of the namespace of kubectl's current context. The volumes with the data stay,
# and so do Secrets: install.sh goes on with them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

label=app.kubernetes.io/name=raftstarter
kubectl delete -f k8s/ --ignore-not-found
kubectl wait --for=delete pod -l "$label" --timeout=2m

kept=$(kubectl get pvc -l "$label" -o name)
if [[ -n $kept ]]; then
  echo "The data is kept, in"
  echo "$kept"
  echo "To delete it for good: kubectl delete pvc -l $label"
fi
