package image

import "hash/crc32"

// castagnoli is the CRC-32C table; amd64 and arm64 have an instruction for it.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC-32C of raw bytes, as Writer.Pages wants it. It may be
// taken by another goroutine than the writer's, which has the copying to do.
func Checksum(raw []byte) uint32 { return crc32.Checksum(raw, castagnoli) }

// joined is the checksum of two pieces, one after the other, from their own and
// the length of the second.
//
// A CRC is a remainder of polynomials over GF(2). To append n bytes is to
// multiply the first piece by x to the power of 8n, and adding is exclusive or;
// the inversions before and after cancel out.
func joined(first, second uint32, n int) uint32 {
	shift := uint32(1) << 31 // one; the coefficient of x^0 is the highest bit
	square := uint32(1) << (31 - 8)
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			shift = times(shift, square)
		}
		square = times(square, square)
	}
	return times(first, shift) ^ second
}

// times multiplies two remainders.
func times(a, b uint32) (product uint32) {
	for ; a != 0; a <<= 1 {
		if a>>31 != 0 {
			product ^= b
		}
		carry := b & 1
		b >>= 1
		if carry != 0 {
			b ^= crc32.Castagnoli
		}
	}
	return product
}
