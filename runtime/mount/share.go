package mount

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// share makes mounts hand on events as they did: who gets events first becomes a
// peer of those who hand them on (MOVE_MOUNT_SET_GROUP of move_mount(2)) and then
// their slave; so groups come behind those that they depend on, and in each the
// mount that shows most is first.
func (m *Maker) share() error {
	now, err := m.sharingNow()
	if err != nil {
		return err
	}
	var settled, rest []*image.Mount
	for i := range m.mounts {
		r := &m.mounts[i]
		switch {
		case r.Own == "" && m.match[r.ID] == nil:
		case m.stays(r, now[r.ID]):
			settled = append(settled, r)
		default:
			rest = append(rest, r)
		}
	}
	slices.SortStableFunc(rest, func(a, b *image.Mount) int { return len(a.Root) - len(b.Root) })
	for len(rest) > 0 {
		i := slices.IndexFunc(rest, func(r *image.Mount) bool {
			master := sharingOf(r.Optional).master
			return master == 0 || !slices.ContainsFunc(rest, func(o *image.Mount) bool { return sharingOf(o.Optional).peers == master })
		})
		if i < 0 {
			return fail.On("mount "+rest[0].Point, errors.New("it gets its own events"))
		}
		if err := m.shareOne(rest[i], settled, now[rest[i].ID]); err != nil {
			return err
		}
		settled = append(settled, rest[i])
		rest = slices.Delete(rest, i, i+1)
	}
	return nil
}

// stays reports a mount that hands on events as it is to already.
func (m *Maker) stays(r *image.Mount, was sharing) bool {
	is := sharingOf(r.Optional)
	switch {
	case m.nested != nil && (r.Own == image.MountCopy || r.Own == image.MountBind):
		return is == m.natural(r)
	case m.match[r.ID] == nil:
		return false
	}
	return !m.unchanged(r.Point) || is.like(was) && (!m.withOwn(is.peers) || r == leader(m.mounts, is.peers))
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

// shareOne makes one mount hand on events as it did, by those that do already.
func (m *Maker) shareOne(r *image.Mount, settled []*image.Mount, was sharing) error {
	if _, err := m.root(r.ID); err != nil {
		return fail.On("mount "+r.Point, err)
	}
	is := sharingOf(r.Optional)
	with := func(peers, master int) *image.Mount {
		i := slices.IndexFunc(settled, func(q *image.Mount) bool {
			s := sharingOf(q.Optional)
			_, open := m.roots[q.ID]
			return open && s.peers == peers && s.master == master && within(r.Root, q.Root)
		})
		if i < 0 {
			return nil
		}
		return settled[i]
	}
	above := func() *image.Mount { // of the group that it gets events from
		i := slices.IndexFunc(settled, func(q *image.Mount) bool {
			_, open := m.roots[q.ID]
			return open && sharingOf(q.Optional).peers == is.master && within(r.Root, q.Root)
		})
		if i < 0 {
			return nil
		}
		return settled[i]
	}
	same, slave, master := with(is.peers, is.master), with(0, is.master), above()
	if is.master != 0 && same == nil && slave == nil && master == nil && was.master == 0 {
		if r.Own == "" && is.peers == 0 {
			return nil // as the bundle makes it on this host
		}
		return m.noMaster(r)
	}
	_, err := m.run(r, func(b *tracee.Batch) {
		switch {
		case is.unbindable:
			m.propagation(b, r, unix.MS_UNBINDABLE)
			return
		case is.peers == 0 && is.master == 0:
			m.propagation(b, r, unix.MS_PRIVATE)
			return
		case same != nil:
			m.join(b, r, same)
			return
		case is.master == 0:
		case master != nil:
			m.join(b, r, master)
			m.propagation(b, r, unix.MS_SLAVE)
		case slave != nil:
			m.join(b, r, slave)
		}
		if is.peers != 0 {
			m.propagation(b, r, unix.MS_SHARED)
		}
	})
	if err != nil {
		err = fmt.Errorf("propagation: %w", err)
	}
	return err
}

func (m *Maker) noMaster(r *image.Mount) error {
	return fail.On("mount "+r.Point, fail.Refuse("", "it got mount events from outside of the container, and nothing here does", "restore with the bundle of the checkpoint"))
}
