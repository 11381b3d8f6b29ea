#!/usr/bin/env bash
# Puts Debian's prometheus and promtool into build/prometheus, where the tests look for them after the PATH. Nothing is
# installed and no daemon starts. Without apt, or offline, it fails with a sentence; the tests that need them then skip.
set -euo pipefail
cd "$(dirname "$0")/.."
target=build/prometheus
if { command -v prometheus && command -v promtool; } >/dev/null || [ -x $target/usr/bin/promtool ]; then exit 0; fi
if ! { command -v apt-get && command -v dpkg-deb; } >/dev/null; then
  echo "get_prometheus: no apt-get here; install prometheus by hand" >&2
  exit 1
fi
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
chmod 755 "$download"
(cd "$download" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; })
mkdir -p $target
dpkg-deb -x "$download"/prometheus_*.deb $target
