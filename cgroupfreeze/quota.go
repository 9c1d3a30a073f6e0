package cgroupfreeze

import (
	"errors"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Limit is a cpu quota that stands in the way of a quick freeze: a task that is
// throttled must wait for its next period before it can freeze, or run a remote
// system call.
type Limit struct {
	Path   string // the control file
	Value  string // what it holds, to be written back
	Lifted string // what to write to lift the quota
}

// quotaFile describes the file of a cpu controller that limits bandwidth.
type quotaFile struct {
	name string
	// lifted returns the value without a quota.
	lifted func(value string) string
}

// quotaV1 is microseconds of cpu time a period, or -1
// (Documentation/scheduler/sched-bwc.rst). The period has its own file and
// stays.
var quotaV1 = quotaFile{"cpu.cfs_quota_us", func(string) string { return "-1" }}

// quotaV2 is "QUOTA PERIOD", both in microseconds, QUOTA being "max" for none.
var quotaV2 = quotaFile{"cpu.max", func(value string) string {
	_, period, _ := strings.Cut(value, " ")
	return strings.TrimSpace("max " + period)
}}

// Quota returns the cpu quotas set on the cgroup and on those below it, parents
// first; none if there is no cpu controller. They can be lifted and put back in
// any order: an unlimited cgroup contradicts neither its parent nor its
// children. Quotas of cgroups above belong to others and are not listed.
func (c *Cgroup) Quota() ([]Limit, error) {
	if c.cpuDir == "" {
		return nil, nil
	}
	dirs, err := subtree(c.cpuDir)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	var limits []Limit
	for _, dir := range dirs {
		path := filepath.Join(dir, c.quota.name)
		value, err := readValue(path)
		if vanished(err) {
			continue // no cpu controller here, or the cgroup has just gone
		}
		if err != nil {
			return nil, err
		}
		if lifted := c.quota.lifted(value); lifted != value {
			limits = append(limits, Limit{Path: path, Value: value, Lifted: lifted})
		}
	}
	return limits, nil
}
