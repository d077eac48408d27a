#!/bin/bash
# The virtual machine's first process on the host's files: network, an RDMA device, the command, power off.
stty -F /dev/ttyS0 -onlcr 2>/dev/null
mount -t cgroup2 cgroup /sys/fs/cgroup
# Spark's launcher reads from <(...), which bash opens by these names.
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
hostname sparktf-vm
# Spark wants to resolve the machine's own name.
echo '127.0.0.1 localhost sparktf-vm' > /etc/hosts
ip link set lo up

# A dummy interface is enough, as all ranks run on this machine; Soft-RoCE takes the largest MTU that fits.
ip link add rdma0 type dummy
ip link set rdma0 mtu 4200
ip addr add 10.77.0.1/24 dev rdma0
ip link set rdma0 up
rdma link add rxe0 type rxe netdev rdma0

# A second device whose port is down, as of a cable that is not plugged in.
ip link add rdma1 type dummy
rdma link add rxe1 type rxe netdev rdma1

# A third whose port is active, in a network that does not lead to the first.
ip link add rdma2 type dummy
ip link set rdma2 mtu 4200
ip addr add 10.78.0.1/24 dev rdma2
ip link set rdma2 up
rdma link add rxe2 type rxe netdev rdma2

# The GID of an IPv4 address appears a moment after the device.
for device in rxe0:0a4d rxe2:0a4e; do
  for _ in $(seq 100); do
    grep -q "ffff:${device#*:}:0001" "/sys/class/infiniband/${device%:*}/ports/1/gids/1" 2>/dev/null && break
    sleep 0.1
  done
done

# What is missing fails the tests that need it (`tests/rdma/test_rdma.py`), here it is told why.
for device in rxe0 rxe1 rxe2; do
  [ -e "/sys/class/infiniband/$device" ] || echo "vm: no device $device"
done

touch /run/vm/started
setsid bash /run/vm/command.sh </dev/null
echo $? > /run/vm/status
sync
echo o > /proc/sysrq-trigger
sleep 60
