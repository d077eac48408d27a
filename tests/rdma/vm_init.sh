#!/bin/busybox sh
# The first process of the virtual machine: load modules, lay a writable layer over the host's files, move there.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /lower /upper /root
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for module in $($b cat /modules.order); do
  $b insmod "/modules/$module" || echo "vm: module $module does not load"
done

share=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o ro,cache=loose,$share host /lower || $b poweroff -f
$b mount -t tmpfs -o size=75% tmpfs /upper
$b mkdir -p /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
for directory in proc sys dev run tmp; do $b mkdir -p /root/$directory; done
$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/shm /root/dev/pts
$b mount -t tmpfs shm /root/dev/shm
$b mount -t devpts pts /root/dev/pts
$b mount -t tmpfs run /root/run
$b mkdir -p /root/run/vm
$b mount -t 9p -o cache=none,$share control /root/run/vm || $b poweroff -f
exec $b switch_root /root /bin/bash /run/vm/guest.sh </dev/console >/dev/console 2>&1
