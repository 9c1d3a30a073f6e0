#!/bin/sh
# A tree of shells: background children, one with children of its own, a
# pipeline whose ends count what passes, and a counter that is this shell.
# $((...)) only: a busybox shell on one small file system has no more.
out=/out/tree
: >"$out.pipe"

(while :; do sleep 1; done) &
(sleep 100000 & sleep 100000 & wait) &
(i=0; while :; do i=$((i + 1)); echo "$i"; sleep 0.1; done) |
	while read -r line; do echo "$line" >>"$out.pipe"; done &

exec 3>>"$out"
n=0
last=0
while :; do
	n=$((n + 1))
	echo "$n" >&3
	if [ $((n % 100)) -eq 0 ]; then
		piped=$(tail -n 1 "$out.pipe")
		if [ "$piped" -le "$last" ]; then
			echo "FAIL the pipeline stands still at $piped" >&3
		fi
		last=$piped
	fi
	sleep 0.05
done
