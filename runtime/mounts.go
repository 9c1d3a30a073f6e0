package runtime

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// checkMounts refuses an image with mounts that the bundle lets nobody make.
func (g *grants) checkMounts(head *image.Head) error {
	c := &head.Container
	if g.has(unix.CAP_SYS_ADMIN) {
		return nil
	}
	const why, remedy = "making it takes CAP_SYS_ADMIN, which the bundle does not give", "add it to the bundle's bounding set if it may be made"
	for i := range c.Mounts {
		if m := &c.Mounts[i]; m.Own != "" {
			return fail.Refuse("mount "+m.Point, why, remedy)
		}
	}
	for i := range head.Tree.Namespaces {
		n := &head.Tree.Namespaces[i]
		if n.Type == "mnt" && head.Nested(n.Owner) == nil {
			return fail.Refuse("mnt namespace", why, remedy)
		}
	}
	for _, point := range c.Unmounted {
		return fail.Refuse("unmounting "+point, why, remedy)
	}
	return nil
}

// prepareMounts begins to change the mounts that the engine has made into those of
// the container.
func (r *restore) prepareMounts() error {
	if !r.made.grants.has(unix.CAP_SYS_ADMIN) {
		return nil // they are as the engine makes them
	}
	have, err := mount.Read(r.made.stub.Pid)
	if err != nil {
		return err
	}
	m, err := mount.NewMaker(r.maker, r.made.stub.Pid, r.head, have, &r.made.config)
	if err != nil {
		return err
	}
	for _, point := range m.Stays() {
		r.Log.Warn("a mount that the container has changed stays as the bundle, which was changed too, makes it", "point", point)
	}
	if !m.Needed() {
		return nil
	}
	if err := r.mayMount(); err != nil {
		return err
	}
	r.mounts, r.mounted = m, append(r.mounted, m)
	return m.Prepare()
}

// mayMount asks the bundle's seccomp filters, which are suspended otherwise,
// whether they let anybody mount, in one way or the other. The calls are without
// sense; the kernel says so only if it is asked.
func (r *restore) mayMount() error {
	if len(r.made.filters) == 0 {
		return nil
	}
	s := r.made.stub
	if err := s.SetOptions(tracee.FilteredOptions); err != nil {
		return err
	}
	var old, recent int
	b, err := r.maker.AsBundle(func(b *tracee.Batch) {
		old = b.Try(unix.SYS_MOUNT, b.String(""), b.String(""), b.String(""), tracee.W(0), tracee.W(0))
		recent = b.Try(unix.SYS_MOVE_MOUNT, tracee.W(-1), b.String(""), tracee.W(-1), b.String(""), tracee.W(0))
	})
	if err := errors.Join(err, s.SetOptions(tracee.StubOptions)); err != nil {
		return err
	}
	if !errors.Is(b.Err(old), unix.ENOENT) && !errors.Is(b.Err(recent), unix.ENOENT) {
		return fail.Refuse("mounts", fmt.Sprintf("the container may not make its own again: mount(2): %v", b.Err(old)), "restore with a bundle whose seccomp filters allow it")
	}
	return nil
}

// attachMounts puts the container's own mounts in place, and keeps open what they
// cover and somebody holds.
func (r *restore) attachMounts() error {
	places := slices.DeleteFunc(r.maker.Covered(), func(p mount.Place) bool {
		return !slices.ContainsFunc(r.head.Container.Mounts, func(m image.Mount) bool { return m.ID == p.Mount })
	})
	if r.mounts == nil {
		if len(places) > 0 {
			return fail.Refuse(places[0].Path, "it is covered by a mount that the bundle lets nobody make", "restore with the bundle of the checkpoint")
		}
		return nil
	}
	held, err := r.mounts.Attach(places)
	r.maker.Cover(held)
	return err
}
