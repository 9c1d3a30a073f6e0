package mount

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// share makes mounts hand on events as they did: who gets events first becomes a
// peer of those who hand them on (MOVE_MOUNT_SET_GROUP of move_mount(2)) and then
// their slave; so groups come behind those that they depend on.
func (m *Maker) share() error {
	mounts := m.head.Container.Mounts
	now, err := m.sharingNow()
	if err != nil {
		return err
	}
	done := map[int]bool{0: true} // groups
	var group func(id int) error
	group = func(id int) error {
		if done[id] {
			return nil
		}
		done[id] = true
		first := leader(mounts, id)
		if first == nil {
			return nil // outside of the container
		}
		if err := group(sharingOf(first.Optional).master); err != nil {
			return err
		}
		return m.shareGroup(id, first, now)
	}
	for i := range mounts {
		r := &mounts[i]
		is, was := sharingOf(r.Optional), now[r.ID]
		if m.match[r.ID] != nil && (!m.unchanged(r.Point) || is.like(was) && !m.withOwn(is.peers)) || m.match[r.ID] == nil && r.Own == "" {
			continue
		}
		if err := group(is.peers); err != nil {
			return err
		}
		if is.peers != 0 {
			continue
		}
		if err := group(is.master); err != nil {
			return err
		}
		if err := m.shareAlone(r, is, was); err != nil {
			return err
		}
	}
	return nil
}

// sharingNow is how the mounts whose roots are open hand on events now.
func (m *Maker) sharingNow() (map[int]sharing, error) {
	list, err := Read(m.pid)
	if err != nil {
		return nil, err
	}
	ids := make([]int, 0, len(m.roots))
	for id := range m.roots {
		ids = append(ids, id)
	}
	kernel, err := m.mountIDs(ids)
	out := map[int]sharing{}
	for i, id := range ids {
		for _, h := range list {
			if err == nil && h.ID == kernel[i] {
				out[id] = sharingOf(h.Optional)
			}
		}
	}
	return out, err
}

// withOwn reports a peer group with one of the container's own mounts in it.
func (m *Maker) withOwn(group int) bool {
	return group != 0 && slices.ContainsFunc(m.order, func(r *image.Mount) bool {
		is := sharingOf(r.Optional)
		return is.peers == group || is.master == group
	})
}

// propagation adds the change of how a mount hands on events.
func (m *Maker) propagation(b *tracee.Batch, r *image.Mount, kind uint64) {
	setattr(b, m.roots[r.ID], 0, 0, kind)
}

// join adds the calls that put a mount into the peer group of another.
func (m *Maker) join(b *tracee.Batch, r, of *image.Mount) {
	m.propagation(b, r, unix.MS_PRIVATE)
	b.Add(unix.SYS_MOVE_MOUNT, tracee.W(m.roots[of.ID]), b.String(""), tracee.W(m.roots[r.ID]), b.String(""),
		tracee.W(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH|unix.MOVE_MOUNT_SET_GROUP))
}

// shareGroup makes a peer group.
func (m *Maker) shareGroup(id int, first *image.Mount, now map[int]sharing) error {
	mounts := m.head.Container.Mounts
	for i := range mounts {
		r := &mounts[i]
		is := sharingOf(r.Optional)
		if is.peers != id {
			continue
		}
		if _, err := m.root(r.ID); err != nil {
			return fail.On("mount "+r.Point, err)
		}
		master := leader(mounts, is.master)
		if r.Own != "" && r == first && is.master != 0 && master == nil && now[r.ID].master == 0 {
			return m.noMaster(r)
		}
		if _, err := m.run(r, func(b *tracee.Batch) {
			switch {
			case r != first:
				m.join(b, r, first)
			case master != nil:
				m.join(b, r, master)
				m.propagation(b, r, unix.MS_SLAVE)
				m.propagation(b, r, unix.MS_SHARED)
			default:
				m.propagation(b, r, unix.MS_SHARED)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

func (m *Maker) noMaster(r *image.Mount) error {
	return fail.On("mount "+r.Point, fail.Refuse("", "it got mount events from outside of the container, and nothing here does", "restore with the bundle of the checkpoint"))
}

// shareAlone makes a mount private, unbindable, or a slave.
func (m *Maker) shareAlone(r *image.Mount, is, was sharing) error {
	if _, err := m.root(r.ID); err != nil {
		return fail.On("mount "+r.Point, err)
	}
	master := leader(m.head.Container.Mounts, is.master)
	if is.master != 0 && master == nil && was.master == 0 {
		if r.Own == "" {
			return nil // as the bundle makes it on this host
		}
		return m.noMaster(r)
	}
	_, err := m.run(r, func(b *tracee.Batch) {
		switch {
		case master != nil:
			m.join(b, r, master)
			m.propagation(b, r, unix.MS_SLAVE)
		case is.master != 0: // it has one
		case is.unbindable:
			m.propagation(b, r, unix.MS_UNBINDABLE)
		default:
			m.propagation(b, r, unix.MS_PRIVATE)
		}
	})
	if err != nil {
		err = fmt.Errorf("propagation: %w", err)
	}
	return err
}
