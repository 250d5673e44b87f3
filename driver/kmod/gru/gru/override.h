/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Forced in front of each file of the kernel's sgi-gru driver. The driver itself stays as it is: all its headers
 * are included here, so that its own includes do nothing any more, and then names that it uses are given another
 * meaning. What is behind them is in binding.c and unplugged.c.
 */
#ifndef TLBRIDGE_OVERRIDE_H
#define TLBRIDGE_OVERRIDE_H

#include "uv_names.h"

#include <linux/bitops.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/export.h>
#include <linux/hugetlb.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nospec.h>
#include <linux/prefetch.h>
#include <linux/proc_fs.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/security.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/srcu.h>
#include <linux/sync_core.h>
#include <linux/timex.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <asm/cacheflush.h>
#include <asm/io_apic.h>
#include <asm/processor.h>
#include <asm/tsc.h>
#include <asm/uv/uv.h>
#include <asm/uv/uv_hub.h>
#include <asm/uv/uv_irq.h>
#include <asm/uv/uv_mmrs.h>

/* binding.c */
int tlbridge_is_uv_system(void);
unsigned long tlbridge_read_local_mmr(unsigned long offset);
int tlbridge_setup_irq(char *name, int cpu, int blade, unsigned long mmr, int limit);
void tlbridge_teardown_irq(unsigned int irq);
void *tlbridge_va(unsigned long paddr);
unsigned long tlbridge_gpa(void *address);
int tlbridge_physical_id(int cpu);
struct gru_thread_state;
int tlbridge_map_gseg(struct gru_thread_state *gts, struct vm_area_struct *vma, unsigned long at,
		      unsigned long pfn, unsigned long bytes, pgprot_t prot);
pte_t tlbridge_huge_pte(pte_t *entry, unsigned long vaddr);
void tlbridge_flush_cache(volatile void *line);

#ifndef TLBRIDGE_PLAIN

/* Is this a UV? If there is a device for us. */
#define is_uv_system()			tlbridge_is_uv_system()
/* One register is read: where the GRU is. */
#define uv_read_local_mmr(offset)	tlbridge_read_local_mmr(offset)
/* The register names the chiplet and its fault map; an MSI-X vector stands for it. */
#define uv_setup_irq(name, cpu, blade, mmr, limit)	tlbridge_setup_irq(name, cpu, blade, mmr, limit)
#define uv_teardown_irq(irq)		tlbridge_teardown_irq(irq)
/* A BAR is not in the direct map of memory. */
#undef __va
#define __va(paddr)			tlbridge_va((unsigned long)(paddr))
/* Tests of the driver pass addresses of their stack, which is not in the direct map either (VMAP_STACK). */
#define uv_gpa(address)			tlbridge_gpa(address)
/* The driver takes the fault map from bits of the APIC id as UV2 wires them. */
#undef cpu_physical_id
#define cpu_physical_id(cpu)		tlbridge_physical_id(cpu)
/*
 * One use: the driver maps a GSEG in a page fault, where the mmap lock is held for reading only. The context that it
 * has just loaded there is in "gts".
 */
#define remap_pfn_range(vma, at, pfn, bytes, prot)	tlbridge_map_gseg(gts, vma, at, pfn, bytes, prot)
/*
 * One use: the entry of a huge page, in a function that has the address in "vaddr". The driver takes its frame for
 * that of the 4 KiB page (right for hugetlbfs, where it rounds down later, wrong inside a transparent huge page).
 */
#undef ptep_get
#define ptep_get(entry)			tlbridge_huge_pte(entry, vaddr)
/* The driver flushes the line of a handle after each start: the moment for the doorbell. */
#define clflush(line)			tlbridge_flush_cache(line)

#endif
#endif
