#!/bin/sh
# Installs the system packages for the project's tests with apt-get: mosquitto (a real broker),
# systemd (systemd-analyze checks the units), iproute2 and faketime (wrong clocks). Does nothing if all are installed. It starts
# no service: a mosquitto on port 1883 would be an unexpected broker.
set -eu

missing=""
need() { # need COMMAND PACKAGE
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need mosquitto mosquitto
need systemd-analyze systemd
need ip iproute2
need faketime faketime

if [ -z "$missing" ]; then
    echo "system packages: all there"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "system packages: this is no Debian or Ubuntu; install by hand:$missing" >&2
    echo "system packages: tests that need them will be skipped" >&2
    exit 0
fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "system packages: neither root nor sudo here; have an administrator run: apt-get install$missing" >&2
        exit 0
    fi
    as_root="sudo"
fi

# Debian's packages start their services unless policy-rc.d forbids it (status 101).
policy=/usr/sbin/policy-rc.d
placed=""
undo() { [ -z "$placed" ] || $as_root rm -f "$policy"; }
trap undo EXIT
trap 'exit 130' INT TERM
if [ ! -e "$policy" ]; then
    placed=yes
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
fi

echo "system packages: installing$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # a list of arguments
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing

# Its package enables it, so it would start at the next boot.
case "$missing" in
*mosquitto*)
    if command -v systemctl >/dev/null 2>&1; then
        $as_root systemctl disable mosquitto.service >/dev/null 2>&1 || true
    fi
    ;;
esac
