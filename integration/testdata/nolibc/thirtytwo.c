/* thirtytwo - a 32-bit program, which sleeps for ever; without a libc. */
static long call(long nr, const void *a, const void *b)
{
	long result;

	asm volatile("int $0x80" : "=a"(result) : "a"(nr), "b"(a), "c"(b)
		     : "memory");
	return result;
}

void _start(void)
{
	static const long nap[2] = { 1000, 0 };

	for (;;)
		call(162 /* nanosleep */, nap, 0);
}
