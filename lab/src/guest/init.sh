#!/bin/sh
# The first process of a guest. It loads the modules that /lab/load names, and runs the commands that come on
# the second serial port, in the root image if there is one: a line with a mark, a kind and the command, in which
# unusual bytes are written as \0ooo. A command's output goes back there; its end is the byte 036, the mark and the
# exit code.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
# From here on everything that the kernel says is wanted in the log.
dmesg -n 8
hostname lab
ip link set lo up

port=/dev/ttyS1
exec 3<>$port
stty -F $port raw -echo

leave() {
	# Closing waits until everything has been sent.
	exec 3>&-
	poweroff -f
}

while read -r module; do
	[ -n "$module" ] || continue
	if ! insmod "$module" 2>/lab/error; then
		printf '\036boot failed %s\n' "$(cat /lab/error)" >&3
		leave
	fi
done </lab/load

# The kernel's own calls of modprobe stay out here; /tmp, /dev and the modules are the same inside.
enter=
if [ -e /lab/image ]; then
	{
		read -r disk </lab/image
		mount -t ext4 -o noatime "$disk" /image &&
			mkdir -p /image/lab /image/usr/lib/modules /lib/modules /lab/over /lab/libraries &&
			cp -a /lab/over/. /image/ &&
			cp -an /lab/libraries/. /image/usr/lib/x86_64-linux-gnu/ &&
			for directory in proc sys dev tmp lab; do
				mount -o rbind /$directory /image/$directory || break
			done &&
			mount -o bind /lib/modules /image/usr/lib/modules
	} 2>/lab/error || {
		printf '\036boot failed the root image: %s\n' "$(cat /lab/error)" >&3
		leave
	}
	enter='chroot /image'
fi

read -r uptime _ </proc/uptime
printf '\036boot ready %s\n' "$uptime" >&3

while read -r mark kind text <&3; do
	printf '%b' "$text" >/lab/command
	case $kind in
	run)
		setsid $enter /bin/sh /lab/command </dev/null >&3 2>&1 3>&-
		code=$?
		;;
	terminal)
		stty -F $port sane
		setsid -c $enter /bin/sh /lab/command <>$port >&0 2>&1 3>&-
		code=$?
		# The end of its session has hung up the port.
		exec 3<>$port
		stty -F $port raw -echo
		;;
	*) break ;;
	esac
	printf '\036%s %s\n' "$mark" "$code" >&3
done
leave
