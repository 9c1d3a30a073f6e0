/*
 * manyareas - 50,000 mappings, every other one a page with content.
 */
#include "hold.h"

#define PAGE 4096UL
#define AREAS 50000UL

int main(void)
{
	unsigned char *p;

	report_open("manyareas");
	p = mmap(NULL, AREAS * PAGE, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	need(p != MAP_FAILED);
	for (size_t i = 0; i < AREAS; i += 2) {
		need(!mprotect(p + i * PAGE, PAGE, PROT_READ | PROT_WRITE));
		*(size_t *)(p + i * PAGE) = i + 1;
	}
	for (;; doze(20 * MS)) {
		for (size_t i = 0; i < AREAS; i += 2)
			need(*(size_t *)(p + i * PAGE) == i + 1);
		tick();
	}
}
