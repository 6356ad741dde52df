#!/usr/bin/env bash
# A real S3 server on this machine: Ceph with one monitor, one OSD on a file of bounded size, and one radosgw.
#
#   scripts/services/ceph.sh up DIR [PORT]     start (or find running); prints shell exports for S3 clients
#   eval "$(scripts/services/ceph.sh up DIR)"  ... and sets them
#   scripts/services/ceph.sh down DIR          stop by process id; DIR keeps the data, so that `up` goes on with it
#
# Listens on 127.0.0.1 only; holds a bucket `keel`. PORT 0 (default) picks a free port; the monitor and the OSD always
# have free ports of their own, so that any number of instances run side by side. Missing packages are installed with
# apt where this is root (exit code 3 where it is not). Bounds, read when DIR is made:
#   KEEL_CEPH_BYTES    size of the OSD's file, which bounds the disk (default 1.5 GiB; it is sparse)
#   KEEL_CEPH_MEMORY   bytes of the OSD's cache (default 128 MiB)
#   KEEL_CEPH_REQUESTS 1: log each request, with its bytes, in DIR/log/requests.log
set -euo pipefail
unset PYTHONPATH PYTHONHOME CEPH_ARGS CEPH_CONF CEPH_KEYRING LD_PRELOAD  # the `ceph` command is a Python program

ACCESS_KEY=keel
SECRET_KEY=keel-local-only
BUCKET=keel
PACKAGES=(ceph-mon ceph-osd radosgw)

fail() { printf 'ceph.sh: error: %s\n' "$1" >&2; exit "${2:-1}"; }

usage() { fail "usage: ceph.sh up DIR [PORT] | ceph.sh down DIR" 2; }

install_packages() {
    installed_all && return
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null \
        || fail "Ceph is not installed; as root on Debian: apt-get install --no-install-recommends ${PACKAGES[*]}" 3
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}"
    } >"$dir/log/apt.log" 2>&1 || fail "apt could not install ${PACKAGES[*]}; its log: $dir/log/apt.log" 3
    installed_all || fail "Ceph's programs are still missing after installing ${PACKAGES[*]}" 3
}

installed_all() {
    local program
    for program in ceph ceph-mon ceph-osd radosgw radosgw-admin monmaptool ceph-authtool; do
        command -v "$program" >/dev/null || return 1
    done
}

# Ports that nothing listens on, below those that the kernel gives to outgoing connections.
free_ports() {
    python3 - "$@" <<'PY'
import random, socket, sys
found, held = [], []
while len(found) < int(sys.argv[1]):
    port, probe = random.randrange(10000, 30000), socket.socket()
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        continue
    held.append(probe)  # kept open, so that no port is found twice
    found.append(str(port))
print(*found)
PY
}

# The process of a pid file, if it still is one of ours: a pid alone may have gone to another program since.
running() {
    local pid
    pid="$(cat "$dir/$1.pid" 2>/dev/null)" || return 1
    grep -qzF -- "$dir/ceph.conf" "/proc/$pid/cmdline" 2>/dev/null || return 1
    [[ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -c1)" != Z ]] && echo "$pid"
}

start() { # name, program and arguments
    local name=$1; shift
    running "$name" >/dev/null && return
    setsid "$@" -c "$dir/ceph.conf" -f >"$dir/log/$name.out" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
}

# Some S3 request as the test user, signed (version 2, which needs one line of hashing); prints the status.
request() { # method, path
    python3 - "$1" "$2" "$port" "$ACCESS_KEY" "$SECRET_KEY" <<'PY'
import base64, email.utils, hashlib, hmac, http.client, sys
method, path, port, key, secret = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
signed = hmac.new(secret.encode(), f"{method}\n\n\n{date}\n{path}".encode(), hashlib.sha1).digest()
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
try:
    connection.request(method, path, headers={"Date": date, "Authorization": f"AWS {key}:{base64.b64encode(signed).decode()}", "Content-Length": "0"})
    print(connection.getresponse().status)
except OSError:
    print(0)
PY
}

exports() {
    local hosts="${NO_PROXY:-${no_proxy:-}}"
    case ",$hosts," in *,127.0.0.1,*) ;; *) hosts="${hosts:+$hosts,}127.0.0.1,localhost" ;; esac
    printf 'export %s\n' "AWS_ENDPOINT_URL=http://127.0.0.1:$port" "AWS_ACCESS_KEY_ID=$ACCESS_KEY" \
        "AWS_SECRET_ACCESS_KEY=$SECRET_KEY" "AWS_DEFAULT_REGION=us-east-1" "NO_PROXY=$hosts" "no_proxy=$hosts"
}

configure() {
    local fsid ports mon1 mon2
    fsid="$(cat /proc/sys/kernel/random/uuid)"
    read -r mon1 mon2 port <<<"$(free_ports 3)"
    [[ "$wanted" == 0 ]] || port=$wanted
    mkdir -p "$dir"/{mon,osd,rgw,run}
    cat >"$dir/ceph.conf.new" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon1,v1:127.0.0.1:$mon2]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = $dir/keyring
auth allow insecure global id reclaim = false
run dir = $dir/run
admin socket =
log file = $dir/log/\$name.log
log to stderr = false
debug default = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
# Start-up is a chain of small changes to the cluster map; by default each waits a second for company.
paxos propose interval = 0.05
paxos min wait = 0.01
[mon]
mon data = $dir/mon
mon data avail crit = 1
mon data avail warn = 2
[osd]
osd data = $dir/osd
osd objectstore = bluestore
bluestore block create = true
bluestore block size = ${KEEL_CEPH_BYTES:-1610612736}
bluestore fsck on mount = false
bluestore cache autotune = false
bluestore cache size = ${KEEL_CEPH_MEMORY:-134217728}
osd class update on start = false
[client.rgw]
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw thread pool size = 64
log file = $dir/log/requests.log
debug rgw = ${KEEL_CEPH_REQUESTS:-0}
# Deleted data is freed soon: the file is small.
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
CONF
    monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon1,v1:127.0.0.1:$mon2]" "$dir/monmap" >/dev/null
    ceph-authtool -C "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
    ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' >/dev/null
    ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
    ceph-authtool "$dir/keyring" --gen-key -n client.rgw --cap mon 'allow rwx' --cap osd 'allow rwx' >/dev/null
    mv "$dir/ceph.conf.new" "$dir/ceph.conf"
    ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring" -c "$dir/ceph.conf" >"$dir/log/mkfs.out" 2>&1
    echo "$port" >"$dir/port"
}

up() {
    local i id new=""
    if [[ -f "$dir/ready" ]]; then
        port="$(cat "$dir/port")"
        [[ "$wanted" == 0 || "$wanted" == "$port" ]] || fail "$dir is made for port $port; use that, or another DIR"
    else
        stop # what an interrupted start left is of no use
        rm -rf "$dir"/{mon,osd,rgw,run,keyring,monmap,ceph.conf,port}
        new=1
    fi
    mkdir -p "$dir/log"
    install_packages
    if [[ -n "$new" ]]; then configure; fi
    start mon ceph-mon -i a
    if [[ -n "$new" ]]; then
        id="$(cat /proc/sys/kernel/random/uuid)"
        # The key of osd.0 comes from the monitor's first keyring.
        timeout 60 ceph -c "$dir/ceph.conf" osd new "$id" 0 >/dev/null 2>"$dir/log/new.out" \
            || fail "the monitor does not answer; its log: $dir/log/mon.out"
        ceph-osd -i 0 --mkfs --osd-uuid "$id" -c "$dir/ceph.conf" >"$dir/log/mkfs.out" 2>&1 \
            || fail "the OSD's file could not be made; its log: $dir/log/mkfs.out"
    fi
    start osd ceph-osd -i 0
    if [[ -n "$new" ]]; then # waits for the OSD by itself
        timeout 60 radosgw-admin -c "$dir/ceph.conf" user create --uid=keel --display-name=keel \
            --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" >"$dir/log/user.json" 2>"$dir/log/user.out" \
            || fail "the user could not be made; the logs: $dir/log"
    fi
    start rgw radosgw -n client.rgw
    for ((i = 0; i < 600; i++)); do
        if [[ "$(request PUT "/$BUCKET")" == 200 ]]; then
            touch "$dir/ready"
            exports
            return
        fi
        running rgw >/dev/null || fail "radosgw stopped (is port $port taken?); its log: $dir/log/rgw.out"
        sleep 0.1
    done
    fail "radosgw does not answer on port $port; its log: $dir/log/rgw.out"
}

stop() {
    local name pid i
    for name in rgw osd mon; do
        pid="$(running "$name")" || { rm -f "$dir/$name.pid"; continue; }
        kill "$pid" 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do running "$name" >/dev/null || break; sleep 0.05; done
        if running "$name" >/dev/null; then kill -9 "$pid" 2>/dev/null || true; fi
        rm -f "$dir/$name.pid"
    done
}

[[ $# -ge 2 ]] || usage
dir="$(realpath -m -- "$2")"
wanted="${3:-0}"
[[ "$wanted" =~ ^[0-9]+$ ]] || usage
case "$1" in
    up) mkdir -p "$dir"; up ;;
    down) stop ;;
    *) usage ;;
esac
