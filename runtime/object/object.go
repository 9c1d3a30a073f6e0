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
	// Groups stand in blocks, so that one more moves only those of its block.
	const block = 512
	blocks := [][][]T{nil}
	for _, one := range all {
		at, met := slices.BinarySearchFunc(blocks[1:], one, func(b [][]T, one T) int { return compare(b[0][0], one) })
		if met {
			blocks[at+1][0] = append(blocks[at+1][0], one)
			continue
		}
		b := blocks[at] // the first group of the next block comes after it
		i, met := slices.BinarySearchFunc(b, one, func(g []T, one T) int { return compare(g[0], one) })
		if met {
			b[i] = append(b[i], one)
			continue
		}
		b = slices.Insert(b, i, []T{one})
		if blocks[at] = b; len(b) > block {
			blocks[at] = b[: block/2 : block/2]
			blocks = slices.Insert(blocks, at+1, slices.Clone(b[block/2:]))
		}
	}
	return slices.Concat(blocks...)
}
