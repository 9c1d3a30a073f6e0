// Package object holds what a checkpoint knows of one object of the stream
// before it has a reference: the record, and where its contents come from.
// References are given out in the order of writing, an object after all that
// it refers to.
package object

import "github.com/ocickpt/ocickpt/image"

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
