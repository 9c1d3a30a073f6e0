package image

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
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
func (c *Container) OwnMounts() ([]*Mount, error) {
	byID := map[int]*Mount{}
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if byID[m.ID] != nil {
			return nil, fmt.Errorf("mount %d stands twice", m.ID)
		}
		if byID[m.ID] = m; m.Own == MountCopy {
			return nil, fmt.Errorf("mount %s is a copy of nothing", quote(m.Point))
		}
	}
	return sortMounts(c.Mounts, byID, false)
}

// OwnMounts lists the mounts of a mount namespace that are no copies of the
// container's, each behind the mounts that it stands on and, of a bind mount of
// the namespace, comes from. Outer are the mounts of the container and of the
// namespaces before this one.
func (n *NestedNamespace) OwnMounts(outer map[int]*Mount) ([]*Mount, error) {
	byID, copies := maps.Clone(outer), map[int]bool{}
	roots := 0
	for i := range n.Mounts {
		m := &n.Mounts[i]
		byID[m.ID] = m
		switch {
		case m.Own == "":
			return nil, fmt.Errorf("mount %s is made in no way", quote(m.Point))
		case m.Own == MountCopy && (outer[m.From] == nil || copies[m.From] || outer[m.From].Own == MountCopy):
			return nil, fmt.Errorf("mount %s is a copy of nothing", quote(m.Point))
		case m.Own == MountCopy:
			copies[m.From] = true
		case m.Point == "/" && !n.has(m.Parent):
			roots++
		}
	}
	if roots > 1 {
		return nil, errors.New("it has several roots")
	}
	return sortMounts(n.Mounts, byID, true)
}

// Pivoted is the root of a mount namespace that has another one than the
// container's (pivot_root(2)), nil where it has not.
func (n *NestedNamespace) Pivoted() *Mount {
	for i := range n.Mounts {
		if m := &n.Mounts[i]; m.Own != MountCopy && m.Point == "/" && !n.has(m.Parent) {
			return m
		}
	}
	return nil
}

func (n *NestedNamespace) has(id int) bool {
	return slices.ContainsFunc(n.Mounts, func(m Mount) bool { return m.ID == id })
}

func own(m *Mount) bool { return m.Own != "" && m.Own != MountCopy }

// sortMounts sorts those of a list that are made anew. It may have a new root.
func sortMounts(list []Mount, byID map[int]*Mount, root bool) (out []*Mount, err error) {
	mine := map[int]bool{}
	count := 0
	for i := range list {
		if mine[list[i].ID] = true; own(&list[i]) {
			count++
		}
	}
	if count == 0 {
		return nil, nil
	}
	waiting := map[int][]*Mount{} // for the mount with an id
	missing := map[*Mount]int{}
	var ready []*Mount
	for i := range list {
		m := &list[i]
		if !own(m) {
			continue
		}
		parent := byID[m.Parent]
		if !mine[m.Parent] {
			parent = nil
		}
		if err := checkOwnMount(m, parent, byID[m.From], root && m.Point == "/"); err != nil {
			return nil, fmt.Errorf("mount %s: %w", quote(m.Point), err)
		}
		needs := []int{m.Parent}
		if m.Own == MountBind {
			needs = append(needs, m.From)
		}
		for _, id := range needs {
			if mine[id] && own(byID[id]) {
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
	if len(out) != count {
		return nil, errors.New("mounts stand on each other in a circle")
	}
	return out, nil
}

func checkOwnMount(m, parent, from *Mount, root bool) error {
	clean := func(p string) bool { return strings.HasPrefix(p, "/") && path.Clean(p) == p && len(p) < maxPath }
	switch {
	case m.Own != MountNew && m.Own != MountBind:
		return fmt.Errorf("it is made in the unknown way %s", quote(m.Own))
	case !clean(m.Point) || !clean(m.Root) && m.FSType == "tmpfs":
		return errors.New("its point is no path")
	case parent == m, parent == nil && !root:
		return fmt.Errorf("mount %d, on which it stands, is not there", m.Parent)
	case (m.From != 0) != (m.Own == MountBind):
		return errors.New("only a bind mount comes from another")
	}
	if parent != nil {
		if _, ok := Below(m.Point, parent.Point); !ok {
			return fmt.Errorf("it does not lie in the mount %s, on which it stands", quote(parent.Point))
		}
	}
	if m.Own == MountNew {
		return nil
	}
	if from == nil || from == m || from.Own == MountBind || from.Own == MountCopy {
		return fmt.Errorf("mount %d, from which it comes, is not there, or comes from another", m.From)
	}
	if _, ok := Below(m.Root, from.Root); !ok {
		return fmt.Errorf("what it shows is not in mount %s", quote(from.Point))
	}
	return nil
}
