// Package cpu asks the processor about itself, by the instructions that Go has
// no functions for.
package cpu

// CPUID executes the instruction (Intel SDM, volume 2).
func CPUID(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

// XCR0 is the set of components of the extended state that the kernel has
// enabled. The processor must have OSXSAVE (CPUID leaf 1).
func XCR0() uint64
