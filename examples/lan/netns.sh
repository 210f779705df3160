#!/usr/bin/env bash
# The three hosts of README.md on one machine, each in a network namespace of its own, with the files and firewalls
# of their folders. Shows that training works and that no hospital can be reached.
#   netns.sh [FOLDER]       writes below FOLDER (default runs/lan), which must not exist yet
#   PATIENTS=8 can be set in the environment.
# Needs root, iproute2 and, for the firewalls, nft. Everything happens in namespaces of this run alone (network,
# mounts, processes): the kernel removes them when it ends, however it ends.
set -euo pipefail

fail() { echo "netns.sh: $*" >&2; exit 4; }
[ "$(id -u)" = 0 ] || fail "needs root, to make network namespaces"
for tool in ip ss unshare; do command -v $tool >/dev/null || fail "needs $tool (iproute2, util-linux)"; done
command -v splitpeer >/dev/null || fail "splitpeer is not on PATH: activate its environment"
if [ "${1:-}" != --inside ]; then
    exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" --inside "$@"
fi
shift

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/lan}
[ ! -e "$folder" ] || fail "$folder exists: remove it, or name another folder"
mkdir -p "$folder"
cd "$folder"
export OMP_NUM_THREADS=1 # three processes share the cores
trap 'exit 130' INT TERM # as first process of its namespace this script takes all others with it

# --- three networks and the router between them (addresses: RFC 5737, for documentation) ---------------------------
declare -A address=([hub]=192.0.2.10 [hospital-a]=198.51.100.10 [hospital-b]=203.0.113.10)
hosts="hub hospital-a hospital-b"
mount -t tmpfs tmpfs /run # `ip netns` keeps its names here: ours are seen by nobody else
echo 1 >/proc/sys/net/ipv4/ip_forward
for host in $hosts; do
    ip netns add $host
    ip link add $host type veth peer name eth0 netns $host
    ip addr add "${address[$host]%.*}.1/24" dev $host
    ip link set $host up
    ip -n $host link set lo up
    ip -n $host addr add "${address[$host]}/24" dev eth0
    ip -n $host link set eth0 up
    ip -n $host route add default via "${address[$host]%.*}.1"
done
echo "127.0.0.1 localhost" >etc-hosts
echo "${address[hub]} hub.example.org" >>etc-hosts
mount --bind etc-hosts /etc/hosts

# --- who gets which file: as README.md says -------------------------------------------------------------------------
splitpeer data phantom data --patients "${PATIENTS:-8}" >/dev/null
splitpeer pki init --federation glioma.example >/dev/null
splitpeer pki issue --role coordinator --site hub --host hub.example.org >/dev/null
for host in $hosts; do
    [ $host = hub ] || splitpeer pki issue --role client --site $host >/dev/null
    mkdir -p $host/tls
    cp "$here/$host/"*.toml $host/
    cp pki/ca.crt pki/ca.crl pki/federation.salt pki/$host.crt pki/$host.key $host/tls/
    if command -v nft >/dev/null; then ip netns exec $host nft -f "$here/$host/firewall.nft"; fi
done

serve() { # HOST ROLE DATA...: the unit's command, with this run's folders instead of /var/lib and /srv
    local host=$1 role=$2 data=$3
    shift 3
    env SPLITPEER_PEER__STATE="$PWD/$host/state" "SPLITPEER_DATA__$data" \
        ip netns exec "$host" splitpeer serve --role "$role" --config "$host/peer.toml" "$@" >"$host/log" 2>&1 &
}
sed -i "s|/var/lib/splitpeer/glioma|$PWD/hub/results|" hub/job.toml
serve hospital-a client "IMAGES=$PWD/data/flair"
clients=$!
serve hospital-b client "IMAGES=$PWD/data/t1ce"
clients="$clients $!"
serve hub coordinator "LABELS=$PWD/data/labels" --job hub/job.toml
hub=$!

# --- as soon as all are connected: does anything in a hospital listen, and could anybody get in? -------------------
until grep -q link.up hospital-a/log && grep -q link.up hospital-b/log; do
    kill -0 $hub 2>/dev/null || { tail -n 3 hub/log hospital-?/log >&2; exit 1; }
    sleep 0.2
done
echo "hub ${address[hub]}: listens at $(ip netns exec hub ss -Hltn | awk '{print $4}')"
for host in hospital-a hospital-b; do
    listening=$(ip netns exec $host ss -Hltun)
    [ -z "$listening" ] || { echo "$host listens: $listening" >&2; exit 1; }
    to=$(ip netns exec $host ss -Htn state established | awk '{print $4}')
    echo "$host ${address[$host]}: nothing listens; connected to $to"
done
for host in hospital-a hospital-b; do
    command -v nft >/dev/null || continue
    # And if something did listen: from the router, which has no firewall of its own, nobody gets in.
    ip netns exec $host timeout 20 python3 -m http.server 8080 >/dev/null 2>&1 &
    until [ -n "$(ip netns exec $host ss -Hltn)" ]; do sleep 0.1; done
    if timeout 2 bash -c "exec 3<>/dev/tcp/${address[$host]}/8080" 2>/dev/null; then
        echo "$host: the firewall lets others in" >&2
        exit 1
    fi
    kill $!
    echo "$host ${address[$host]}: a port opened on purpose cannot be reached from outside"
done

status=0
for process in $hub $clients; do wait "$process" || status=$?; done
[ $status -eq 0 ] || { tail -n 3 hub/log hospital-?/log >&2; exit $status; }
tail -n 1 hub/log
