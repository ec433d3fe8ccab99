#!/bin/bash
# First process of a host of the test cluster, in namespaces of its own: cluster.sh FOLDER HOST [NODES SSH GPUS]
# With three more arguments it is the host of the controller, whose end is the end of all. Its input is held open by who
# started it: the end of input, which comes also where that process is killed, ends the host.
set -eu
folder=$1 host=$2
export SLURM_CONF=$folder/slurm.conf

hostname "$host"
mount -t tmpfs tmpfs /dev/shm
mount --bind "$folder/hosts.$host" /etc/hosts

control() {
    local nodes=$1 ssh=$2 gpus=$3 node library
    mount -t tmpfs tmpfs /run
    mkdir -p /run/munge /run/netns /run/sshd
    if [ "$ssh" = yes ]; then mount --bind "$folder/ssh_config" /etc/ssh/ssh_config; fi
    for ((gpu = 0; gpu < gpus; gpu++)); do mknod -m 666 "/run/gpu$gpu" c 1 3; done

    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.1/24 dev br0
    ip link set br0 up
    for ((node = 1; node <= nodes; node++)); do
        ip netns add "n$node"
        ip link add "n$node" type veth peer name eth0 netns "n$node"
        ip link set "n$node" up
        ip -n "n$node" addr add "10.77.0.$((10 + node))/24" dev eth0
        ip -n "n$node" link set eth0 up
        ip -n "n$node" link set lo up
    done

    # SLURM's plugin opens libpmix.so, a name that only the -dev package has
    for library in /usr/lib/*/pmix2/lib; do
        if [ -e "$library/libpmix.so.2" ] && [ ! -e "$library/libpmix.so" ]; then
            cp -a "$library" "$folder/pmix"
            ln -s libpmix.so.2 "$folder/pmix/libpmix.so"
            mount --bind "$folder/pmix" "$library"
        fi
    done

    (umask 077 && head -c 1024 /dev/urandom >/run/munge/key)
    munged --key-file=/run/munge/key --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid --seed-file=/run/munge/seed \
        --log-file="$folder/log/munged.log" --num-threads=2
    slurmctld
}

node() {
    mkdir -p "$folder/spool.$host"
    slurmd -N "$host"
    if [ -e "$folder/sshd_config" ]; then /usr/sbin/sshd -f "$folder/sshd_config" -E "$folder/log/sshd.$host.log"; fi
}

if [ $# -gt 2 ]; then control "${@:3}"; else node; fi
echo ready
while read -r _; do :; done

kill -KILL -1 || true
if [ $# -gt 2 ]; then until rm -rf "$folder" 2>/dev/null; do :; done; fi
