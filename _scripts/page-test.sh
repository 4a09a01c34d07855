#!/usr/bin/env bash
# Tries the page in a real browser: three nodes, of which the leader and then others are killed, and a node that wants a token.
# Leaves pictures in the directory given, ./tmp/page unless said. Needs Go and Chromium, which is installed from Debian's
# packages where there is none.
#
#   _scripts/page-test.sh [DIRECTORY [FLAG OF go test...]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pictures=$(realpath -m "${1:-tmp/page}")
mkdir -p "$pictures"
if ! command -v chromium >/dev/null; then
  as_root=()
  ((EUID == 0)) || as_root=(sudo -n)
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null
fi
chromium --version
PICTURES=$pictures go test -count=1 -timeout 3m "${@:2}" ./_scripts/page
echo "pictures are in $pictures"
