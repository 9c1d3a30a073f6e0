package main

import (
	"fmt"
	"strings"
	"time"
)

// table is the markdown table: a line for each workload and tool.
type table struct {
	disk float64 // bytes a second that dd writes
	rows []string
}

func newTable(disk float64) *table { return &table{disk: disk} }

func (t *table) add(w workload, tools []tool, medians []sample) {
	for i, tool := range tools {
		m := medians[i]
		t.rows = append(t.rows, fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |",
			w.name, tool.name, ms(m.start), ms(m.checkpoint), ms(m.stopped), ms(m.restore),
			mib(m.image), mib(m.dumpRSS), mib(m.restoreRSS),
			t.share(m.image, m.checkpoint), t.share(m.image, m.restore)))
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
	return fmt.Sprintf("%s%s\n\nMedians. dd bs=1M writes %.2f GiB/s to the same file system; the last two columns say\n"+
		"at which share of that the image was written and read, over the whole wall time.\n",
		head, strings.Join(t.rows, "\n"), t.disk/(1<<30))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Millisecond)) }
func mib(n int64) string        { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

func ratio(a, b time.Duration) string {
	if b == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f", float64(a)/float64(b))
}

// share is empty for images too small to say anything about the disk.
func (t *table) share(bytes int64, took time.Duration) string {
	if bytes < 32<<20 || took == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*float64(bytes)/took.Seconds()/t.disk)
}
