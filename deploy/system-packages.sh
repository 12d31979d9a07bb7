#!/bin/sh
# Installs what the project's tests take from the system, by apt-get: mosquitto (a real broker),
# systemd (systemd-analyze checks the units), iproute2 and faketime (clocks that are wrong). Does nothing when all is there, and starts
# no service: a mosquitto left on port 1883 would be a broker that nobody asked for.
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

# Debian's packages start what they install unless policy-rc.d forbids it (status 101).
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
# shellcheck disable=SC2086  # a list of words
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing

# Enabled by its package, it would start with the next boot.
case "$missing" in
*mosquitto*)
    if command -v systemctl >/dev/null 2>&1; then
        $as_root systemctl disable mosquitto.service >/dev/null 2>&1 || true
    fi
    ;;
esac
