package main

import (
	"fmt"
	"strings"
	"time"
)

// table is the markdown table: a line for each workload and tool.
type table struct {
	rows  []string
	rates []string // of dd
}

// add adds the lines of a workload.
func (t *table) add(w workload, tools []tool, medians []sample) {
	if dd := medians[0].dd; dd > 0 {
		t.rates = append(t.rates, fmt.Sprintf("%d MiB at %.2f GiB/s", w.mib, dd/(1<<30)))
	}
	for i, tool := range tools {
		m := medians[i]
		t.rows = append(t.rows, fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |",
			w.name, tool.name, ms(m.start), ms(m.checkpoint), ms(m.stopped), ms(m.restore),
			mib(m.image), mib(m.dumpRSS), mib(m.restoreRSS),
			percent(m.written), percent(m.read)))
		if i > 0 {
			t.rows = append(t.rows, fmt.Sprintf("| | ratio to %s | | %s | %s | %s | | | | | |", tools[0].name,
				ratio(m.checkpoint, medians[0].checkpoint), ratio(m.stopped, medians[0].stopped),
				ratio(m.restore, medians[0].restore)))
		}
	}
}

func (t *table) String() string {
	const head = `| container | tool | run -d (ms) | checkpoint (ms) | stopped (ms) | restore (ms) | image (MiB) | checkpoint's memory (MiB) | restore's memory (MiB) | written, of dd | read, of dd |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
`
	text := head + strings.Join(t.rows, "\n") + "\n\nMedians, all taken in turns, each after a dd of as much to warm up.\n"
	if len(t.rates) == 0 {
		return text
	}
	return text + fmt.Sprintf(`In the same turns dd bs=1M writes to a new file of the same file system:
%s. The last two columns say at which share of the dd of its
turn ocickpt writes and reads an image: its size by the time of the phases that
write it (from its first byte until it has its name) and that read it. Neither dd
nor these phases sync; the columns of checkpoint and restore are wall time from
start to exit, the checkpoint's with its fsync.
`, strings.Join(t.rates, ", "))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Millisecond)) }
func mib(n int64) string        { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

func ratio(a, b time.Duration) string {
	if b == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f", float64(a)/float64(b))
}

func percent(share float64) string {
	if share == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*share)
}
