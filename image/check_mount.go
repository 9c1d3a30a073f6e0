package image

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Below is a path in relation to a directory that it lies in, "." for that
// itself.
func Below(path, dir string) (rel string, ok bool) {
	if path == dir {
		return ".", true
	}
	return strings.CutPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// OwnMounts lists the mounts that the container has made itself, each behind the
// mounts that it stands on and, of a bind mount, comes from.
func (c *Container) OwnMounts() (out []*Mount, err error) {
	byID := map[int]*Mount{}
	waiting := map[int][]*Mount{} // for the mount with an id
	var ready []*Mount
	own := 0
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if m.Own != "" {
			own++
		}
		if byID[m.ID] != nil {
			return nil, fmt.Errorf("mount %d stands twice", m.ID)
		}
		byID[m.ID] = m
	}
	if own == 0 {
		return nil, nil
	}
	missing := map[*Mount]int{}
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if m.Own == "" {
			continue
		}
		if err := checkOwnMount(m, byID[m.Parent], byID[m.From]); err != nil {
			return nil, fmt.Errorf("mount %s: %w", quote(m.Point), err)
		}
		needs := []int{m.Parent}
		if m.Own == MountBind {
			needs = append(needs, m.From)
		}
		for _, id := range needs {
			if byID[id].Own != "" {
				waiting[id] = append(waiting[id], m)
				missing[m]++
			}
		}
		if missing[m] == 0 {
			ready = append(ready, m)
		}
	}
	for len(ready) > 0 {
		m := ready[0]
		out, ready = append(out, m), ready[1:]
		for _, w := range waiting[m.ID] {
			if missing[w]--; missing[w] == 0 {
				ready = append(ready, w)
			}
		}
	}
	if len(out) != own {
		return nil, errors.New("mounts stand on each other in a circle")
	}
	return out, nil
}

func checkOwnMount(m, parent, from *Mount) error {
	clean := func(p string) bool { return strings.HasPrefix(p, "/") && path.Clean(p) == p && len(p) < maxPath }
	switch {
	case m.Own != MountNew && m.Own != MountBind:
		return fmt.Errorf("it is made in the unknown way %s", quote(m.Own))
	case !clean(m.Point):
		return errors.New("its point is no path")
	case parent == nil || parent == m:
		return fmt.Errorf("mount %d, on which it stands, is not there", m.Parent)
	case (m.From != 0) != (m.Own == MountBind):
		return errors.New("only a bind mount comes from another")
	}
	if _, ok := Below(m.Point, parent.Point); !ok {
		return fmt.Errorf("it does not lie in the mount %s, on which it stands", quote(parent.Point))
	}
	if m.Own == MountNew {
		return nil
	}
	if from == nil || from == m || from.Own == MountBind {
		return fmt.Errorf("mount %d, from which it comes, is not there, or comes from another", m.From)
	}
	if _, ok := Below(m.Root, from.Root); !ok {
		return fmt.Errorf("what it shows is not in mount %s", quote(from.Point))
	}
	return nil
}
