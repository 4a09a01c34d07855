#!/usr/bin/env bash
# Installs the service in the namespace of kubectl's current context, or brings what is there up to date, and waits until
# all pods are ready. The cluster must know the image raftstarter:latest (see build.sh).
#
#   _scripts/install.sh [VARIANT]      a directory of k8s/variants: memory or tls
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# == 0)); then
  applied=$(kubectl apply -f k8s/)
else
  applied=$(kubectl kustomize --load-restrictor LoadRestrictionsNone "k8s/variants/$1" | kubectl apply -f -)
fi
echo "$applied"

# Pods read the configuration when they start.
if [[ $applied == *"configmap/raftstarter configured"* ]]; then
  echo "The configuration has changed: restarting the pods, one after another."
  kubectl rollout restart statefulset/raftstarter
fi
kubectl rollout status statefulset/raftstarter --timeout=5m
