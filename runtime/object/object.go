// Package object holds what a checkpoint knows of one object of the stream
// before it has a reference: the record, and where its contents come from.
// References are given out in the order of writing, an object after all that
// it refers to.
package object

import (
	"slices"

	"github.com/ocickpt/ocickpt/image"
)

// Object is one object of the stream.
type Object struct {
	Ref    image.Ref // 0 until it is written
	Type   image.Type
	Record any
	// Complete, if set, fills in the references of the record just before it
	// is written.
	Complete func()
}

// Write gives the object its reference and writes its record.
func (o *Object) Write(w *image.Writer) error {
	if o.Complete != nil {
		o.Complete()
	}
	o.Ref = w.NewRef()
	return w.Record(o.Type, o.Ref, o.Record)
}

// RefOf is the object's reference, 0 for no object.
func RefOf(o *Object) image.Ref {
	if o == nil {
		return 0
	}
	return o.Ref
}

// Same puts together what an order such as kcmp(2)'s has for equal: groups in
// that order, each in the order of the list. A comparison is a system call, and
// most are of things that are equal to one that was met before: sorting the list
// would compare these with each other.
func Same[T any](all []T, compare func(a, b T) int) (groups [][]T) {
	for _, one := range all {
		i, met := slices.BinarySearchFunc(groups, one, func(g []T, one T) int { return compare(g[0], one) })
		if met {
			groups[i] = append(groups[i], one)
		} else {
			groups = slices.Insert(groups, i, []T{one})
		}
	}
	return groups
}
