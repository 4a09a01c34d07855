#!/usr/bin/env bash
# Builds the image raftstarter:latest, with the version that git describes. GOPROXY is passed on if it is set.
#
#   _scripts/build.sh [OPTION...]      options of docker build, such as --network host
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(git describe --tags --always --dirty 2>/dev/null || echo dev)
docker build --tag raftstarter:latest --build-arg GOPROXY --build-arg VERSION="$version" "$@" .
