package runtime

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/cgroup"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// cgroupsOf reads a task's cgroup by hierarchy, "" for the unified one.
func cgroupsOf(tid int) (map[string]string, error) {
	out, err := cgroup.Of(fmt.Sprintf("/proc/%d", tid))
	return out, goneIs(tid, err)
}

// findCgroups notes the container's own cgroups: those that libcontainer has made,
// and where init is in other hierarchies.
func (c *container) findCgroups() (err error) {
	if c.record.Cgroups, err = cgroupsOf(c.initPid); err != nil {
		return err
	}
	if c.hierarchies, err = cgroup.Hierarchies(c.cgroupPaths); err != nil {
		return err
	}
	for _, h := range c.hierarchies {
		c.record.Cgroups[h.Name] = h.Path
	}
	return nil
}

// scanCgroups reads the cgroups that the container has made.
func (n *census) scanCgroups(c *container) error {
	all, err := cgroup.Scan(c.hierarchies, c.maps)
	if err != nil || len(all) == 0 {
		return err
	}
	if !mayMakeCgroups(c.spec) {
		c.warn("cgroups below the container's own are left out: the bundle lets no task make any, so they are somebody else's")
		return nil
	}
	n.cgroups = all
	return nil
}

// place finds in which cgroups a process and its threads are, by thread.
func (n *census) place(c *container, p *process) error {
	tids := p.tids
	if len(n.cgroups) == 0 {
		tids = tids[:1] // all are where they began
	}
	for _, tid := range tids {
		all, err := cgroupsOf(tid)
		if err != nil {
			return err
		}
		at := map[string]string{}
		for hierarchy, path := range all {
			below, ok := cgroup.Below(c.record.Cgroups[hierarchy], path)
			if !ok || below != "" && len(n.cgroups) == 0 {
				return fail.Refuse("cgroup "+hierarchy+":"+path, "it is not the container's own, nor one that a task of it has made", "move it to the container's cgroup")
			}
			if below == "" {
				continue
			}
			if frozen := n.frozen(hierarchy, below); frozen != "" {
				return fail.Refuse("cgroup "+hierarchy+":"+frozen, "the container has frozen it itself, so that nobody else can stop the tasks in it; that is not supported yet", "thaw it before the checkpoint")
			}
			at[hierarchy] = below
		}
		p.cgroups = append(p.cgroups, at)
	}
	return nil
}

// frozen is the frozen cgroup that a path is in, or "".
func (n *census) frozen(hierarchy, path string) string {
	for i := range n.cgroups {
		s := &n.cgroups[i]
		if _, in := cgroup.Below(s.Path, path); in && s.Hierarchy == hierarchy && cgroup.Frozen(s) {
			return s.Path
		}
	}
	return ""
}

// notePlaces puts the threads' cgroups into the records.
func (p *process) notePlaces() {
	for i := range p.state.Task.Threads {
		if i < len(p.cgroups) && len(p.cgroups[i]) > 0 {
			p.state.Task.Threads[i].Cgroups = p.cgroups[i]
		}
	}
}

// mayMakeCgroups reports whether a bundle gives its tasks a place to make cgroups
// in: a writable mount of them, or the right to mount one.
func mayMakeCgroups(spec *specs.Spec) bool {
	if caps := spec.Process.Capabilities; caps != nil && slices.Contains(caps.Bounding, "CAP_SYS_ADMIN") {
		return true
	}
	return slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool {
		ro := slices.Contains(m.Options, "ro") && !slices.Contains(m.Options, "rw")
		return !ro && (m.Type == "cgroup" || m.Type == "cgroup2" || strings.HasPrefix(m.Source, "/sys/fs/cgroup"))
	})
}

// makeCgroups makes the cgroups of the image and moves the init stub to its own,
// before it opens anything there and before others are forked.
func (r *restore) makeCgroups() error {
	hierarchies, err := cgroup.Hierarchies(r.made.state.CgroupPaths)
	if err != nil {
		return err
	}
	if r.cgroups, err = cgroup.NewMaker(&r.head.Container, hierarchies); err != nil || !r.cgroups.Needed() {
		return err
	}
	r.cgroups.Warn, r.cgroups.HostUID, r.cgroups.HostGID = r.Log.Warn, r.made.config.HostUID, r.made.config.HostGID
	if err := r.cgroups.Make(); err != nil {
		return err
	}
	if err := r.cgroups.Enter(r.made.stub.Pid, r.placeOf(r.made.initPid), false); err != nil {
		return err
	}
	return r.cgroups.HandOn()
}

// placeOf are the cgroups of a process.
func (r *restore) placeOf(pid int) map[string]string {
	if t := r.head.Task(int32(pid)); t != nil {
		return t.Threads[0].Cgroups
	}
	return nil
}

// enterCgroups moves a process from where its parent began, the init's place.
func (r *restore) enterCgroups(pid, host int) error {
	if !r.cgroups.Needed() {
		return nil
	}
	return r.cgroups.Enter(host, between(r.placeOf(r.made.initPid), r.placeOf(pid)), false)
}

// placeTasks moves the processes to their cgroups. What is yet to be a zombie
// stays with the init.
func (r *restore) placeTasks() error {
	if !r.cgroups.Needed() {
		return nil
	}
	for pid, s := range r.stubs {
		if r.head.Task(int32(pid)) == nil {
			continue
		}
		if err := r.enterCgroups(pid, s.Pid); err != nil {
			return fail.In(fmt.Sprintf("task %d", pid), err)
		}
	}
	return nil
}

// placeThreads moves threads that are elsewhere than their process.
func (r *restore) placeThreads(t *image.Task, threads []*tracee.Stub) error {
	for i := 1; i < len(threads); i++ {
		to := between(t.Threads[0].Cgroups, t.Threads[i].Cgroups)
		if err := r.cgroups.Enter(threads[i].Tid, to, true); err != nil {
			return fail.On(fmt.Sprintf("thread %d", t.Threads[i].Tid), err)
		}
	}
	return nil
}

// between is where to go from some cgroups to be in others.
func between(from, to map[string]string) map[string]string {
	out := map[string]string{}
	for hierarchy := range from {
		out[hierarchy] = "" // the container's own
	}
	maps.Copy(out, to)
	for hierarchy, path := range out {
		if from[hierarchy] == path {
			delete(out, hierarchy)
		}
	}
	return out
}

// checkCgroups refuses cgroups that no task of the container could have made, and
// tasks that nobody could let go.
func (g *grants) checkCgroups(head *image.Head) error {
	c := &head.Container
	n := census{cgroups: c.Subs}
	for _, t := range head.Tasks {
		for i := range t.Threads {
			for hierarchy, path := range t.Threads[i].Cgroups {
				if frozen := n.frozen(hierarchy, path); frozen != "" {
					return fail.In(fmt.Sprintf("task %d", t.Pid), fail.Refuse("cgroup "+hierarchy+":"+frozen, "it is frozen with tasks in it; that is not supported yet", ""))
				}
			}
		}
	}
	if len(c.Subs) > 0 && !g.cgroups {
		return fail.Refuse("cgroup "+c.Subs[0].Hierarchy+":"+c.Subs[0].Path, "a task has made it, and the bundle mounts no cgroups that tasks may write to", "mount them read-write (mounts, type cgroup) if they may")
	}
	return nil
}
