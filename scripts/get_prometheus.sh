#!/usr/bin/env bash
# Puts Debian's prometheus and promtool into build/prometheus, where the tests look for them after the PATH. Nothing is
# installed and no daemon starts. Without apt, or offline, it says so and fails; the tests that need them then skip.
set -euo pipefail
cd "$(dirname "$0")/.."
target=build/prometheus
if command -v prometheus promtool >/dev/null || [ -x $target/usr/bin/promtool ]; then exit 0; fi
command -v apt-get dpkg-deb >/dev/null || { echo "get_prometheus: no apt-get here; install prometheus by hand" >&2; exit 1; }
mkdir -p $target/download
cd $target/download
apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }
dpkg-deb -x prometheus_*.deb ..
rm -r "$PWD"
