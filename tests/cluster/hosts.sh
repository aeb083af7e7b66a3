#!/bin/bash
# Hosts made of namespaces, so that one machine can try a real cluster: `ray up` over SSH, cut links, power cuts.
#
#   LAB=FOLDER VENV=FOLDER ROOT=CHECKOUT hosts.sh up WORKERS | down
#                                       hosts.sh on HOST COMMAND... | cut HOST | heal HOST | off HOST | boot HOST | power HOST
#
# Hosts are `lap` (where the user sits), `h0` (the head), `h1`, `h2` ... Each has its own address on one bridge, PIDs,
# host name, /tmp, home (/tmp/home), /dev/shm and SSH server; VENV, ROOT and $LAB/shared (as /tmp/shared, the NFS of this
# cluster) are the same on all. Nothing has a way out of the machine, nothing outside it changes, and `down` ends all.
# cut: the link goes down. off: power cut. boot: the same host again, its disk kept, its processes gone. power: is it on?
set -euo pipefail
: "${LAB:?}" "${VENV:?}" "${ROOT:?}"
export LAB VENV ROOT
NET=10.77.0
SELF=$(readlink -f "$0")

address() { if [ "$1" = lap ]; then echo "$NET.9"; else echo "$NET.1${1#h}"; fi; }
inside() { nsenter -t "$(cat "$LAB/pid")" -m -n -p -- "$@"; }
await() { for _ in $(seq 1200); do "$@" 2>/dev/null && return; sleep 0.1; done; echo "hosts.sh: waited in vain: $*" >&2; return 1; }

start_host() {
  : >"$LAB/$1.log"
  setsid ip netns exec "$1" unshare -m -p -u -i -f --kill-child --mount-proc \
    bash "$SELF" _host "$1" >"$LAB/$1.log" 2>&1 </dev/null &
  echo $! >"$LAB/$1.pid"
  await grep -q listening "$LAB/$1.log"
}

case $1 in
up)
  mkdir -p "$LAB/shared"
  ssh-keygen -qt ed25519 -N '' -f "$LAB/key"
  ssh-keygen -qt ed25519 -N '' -f "$LAB/hostkey"
  setsid unshare -n -m -p -u -i -f --mount-proc bash "$SELF" _lab "$2" >"$LAB/lab.log" 2>&1 </dev/null &
  await grep -q . "/proc/$!/task/$!/children"
  tr -d ' ' <"/proc/$!/task/$!/children" >"$LAB/pid" # first of all: with it, `down` ends what has come up
  await test -e "$LAB/ready"
  ;;
_lab) # PID 1 of the network
  mount -t tmpfs tmpfs /run
  mkdir /run/netns /run/sshd
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$NET.1/24" dev br0
  ip link set br0 up
  for host in lap $(seq -f h%g 0 "$2"); do
    ip netns add "$host"
    ip link add "v$host" type veth peer name eth0 netns "$host"
    ip link set "v$host" master br0 up
    ip -n "$host" link set lo up
    ip -n "$host" addr add "$(address "$host")/24" dev eth0
    ip -n "$host" link set eth0 up
    start_host "$host"
  done
  touch "$LAB/ready"
  while :; do wait || :; sleep 1; done
  ;;
_host) # PID 1 of one host
  host=$2 disk=$LAB/$2
  hostname "$host"
  mkdir -p "$disk/tmp/home/.ssh" "$disk/tmp/shared" "$disk$VENV" "$disk$ROOT"
  printf '%s %s\n' "$(address "$host")" "$host" 127.0.0.1 localhost >"$disk/hosts"
  sed 's#^root:.*#root:x:0:0::/tmp/home:/bin/bash#' /etc/passwd >"$disk/passwd"
  # What on-prem.yaml would install is there already; the rsynced checkout is what Python imports.
  ln -sfn "$VENV" "$disk/tmp/home/saltray-venv"
  echo 'export PATH=$HOME/saltray-venv/bin:$PATH PYTHONPATH=$HOME/saltray RAY_USAGE_STATS_ENABLED=0' >"$disk/tmp/home/.bashrc"
  # Ray lowers its workers' priority; here all hosts share one machine with what else runs there.
  echo 'export RAY_worker_niceness=0' >>"$disk/tmp/home/.bashrc"
  echo '. ~/.bashrc' >"$disk/tmp/home/.profile"
  cp "$LAB/key.pub" "$disk/tmp/home/.ssh/authorized_keys"
  if [ "$host" = lap ]; then cp "$LAB/key" "$disk/tmp/home/.ssh/id_ed25519"; fi
  chmod -R go= "$disk/tmp/home"
  chmod 1777 "$disk/tmp"
  mount --bind "$disk/hosts" /etc/hosts
  mount --bind "$disk/passwd" /etc/passwd
  mount --bind "$LAB/shared" "$disk/tmp/shared"
  mount --bind "$VENV" "$disk$VENV"
  mount --bind "$ROOT" "$disk$ROOT"
  mount -t tmpfs tmpfs /dev/shm
  cp "$LAB/hostkey" /dev/shm/
  cd /
  mount --rbind "$disk/tmp" /tmp
  exec /usr/sbin/sshd -D -e -f /dev/null -h /dev/shm/hostkey -o ListenAddress="$(address "$host")" -o PidFile=none \
    -o UsePAM=no -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password -o MaxStartups=50 -o MaxSessions=50
  ;;
_boot) start_host "$2" ;;
on)
  host=$2
  shift 2
  inside ssh -qi "$LAB/key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "root@$(address "$host")" "$@"
  ;;
cut) inside ip link set "v$2" down ;;
heal) inside ip link set "v$2" up ;;
power) inside kill -0 "$(cat "$LAB/$2.pid")" ;;
off) # the link first: a power cut says no goodbye
  inside ip link set "v$2" down
  inside kill -9 "$(cat "$LAB/$2.pid")"
  ;;
boot)
  inside ip link set "v$2" up
  inside bash "$SELF" _boot "$2"
  ;;
down) # one kill ends every process and with them the namespaces
  kill -9 "$(cat "$LAB/pid")"
  ;;
esac
