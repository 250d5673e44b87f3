// SPDX-License-Identifier: GPL-2.0
/*
 * What is behind the names of override.h.
 */
#include "override.h"

#include <linux/irq.h>
#include <linux/sched/signal.h>

#include "gru.h"
#include "grutables.h"
#include "gruhandles.h"
#include "tlbridge_uv.h"
#include "unplugged.h"

static struct tlbridge_uv_device *dev;

static struct tlbridge_uv_driver driver = {
	.owner = THIS_MODULE,
	.unplugged = tlbridge_unplugged,
	.released = tlbridge_stand_in_destroy,
};

/*
 * The driver asks twice: first thing in its init, and first thing in its exit, which must do something exactly if
 * the init did, whatever has become of the device since then.
 */
int tlbridge_is_uv_system(void)
{
	static bool asked;

	if (asked) {
		if (dev)
			tlbridge_uv_leave(&driver);
		return dev != NULL;
	}
	asked = true;
	if (!tlbridge_stand_in_create())
		return 0;
	dev = tlbridge_uv_claim(&driver);
	if (!dev)
		tlbridge_stand_in_destroy();
	return dev != NULL;
}

unsigned long tlbridge_read_local_mmr(unsigned long offset)
{
	if (WARN_ON(offset != UVH_RH_GAM_GRU_OVERLAY_CONFIG))
		return 0;
	return dev->chiplets_paddr;
}

void *tlbridge_va(unsigned long paddr)
{
	if (paddr == dev->chiplets_paddr)
		return dev->chiplets;
	return (void *)(paddr + PAGE_OFFSET);
}

int tlbridge_setup_irq(char *name, int cpu, int blade, unsigned long mmr, int limit)
{
	unsigned long first[] = { UVH_GR0_TLB_INT0_CONFIG, UVH_GR1_TLB_INT0_CONFIG };
	unsigned long step = UVH_GR0_TLB_INT1_CONFIG - UVH_GR0_TLB_INT0_CONFIG;
	int chiplet;

	/*
	 * The driver takes 128 MiB for each node that a kernel can have as GRU space, and refuses to translate to
	 * anywhere in there. In a guest there may be memory behind our two chiplets.
	 */
	gru_end_paddr = gru_start_paddr + TLBRIDGE_CHIPLETS_BYTES;

	for (chiplet = 0; chiplet < TLBRIDGE_CHIPLETS; chiplet++) {
		unsigned long tfm = (mmr - first[chiplet]) / step;

		if (mmr >= first[chiplet] && tfm < TLBRIDGE_TFMS)
			return tlbridge_uv_setup_vector(dev, chiplet * TLBRIDGE_TFMS + tfm, cpu);
	}
	pr_err("gru: register %#lx is no fault-map interrupt\n", mmr);
	return -EINVAL;
}

void tlbridge_teardown_irq(unsigned int irq)
{
	tlbridge_uv_teardown_vector(irq);
}

/* Frames of what vmalloc has mapped are found page by page: the object must not cross into another page. */
unsigned long tlbridge_gpa(void *address)
{
	unsigned long paddr;

	if (is_vmalloc_or_module_addr(address))
		paddr = page_to_phys(vmalloc_to_page(address)) + offset_in_page(address);
	else
		paddr = __pa(address);
	return uv_soc_phys_ram_to_gpa(paddr);
}

/*
 * An APIC id from which the driver's macros for UV2 read: socket = bit 3 of the CPU's number, core = bits 0 to 2,
 * and the hyperthread bit for CPUs from 16 on. Those have no vector of their own and share the map of the CPU 16
 * below, on which the interrupt is handled.
 */
int tlbridge_physical_id(int cpu)
{
	int core = cpu & 7, socket = (cpu >> 3) & 1, thread = cpu >= TLBRIDGE_TFMS;

	return thread | (core & 3) << 1 | (core & 4) << 2 | socket << 5;
}

int tlbridge_map_gseg(struct gru_thread_state *gts, struct vm_area_struct *vma, unsigned long at,
		      unsigned long pfn, unsigned long bytes, pgprot_t prot)
{
	unsigned long done;

	if (tlbridge_is_unplugged())
		goto fail;
	for (done = 0; done < bytes; done += PAGE_SIZE) {
		vm_fault_t ret = vmf_insert_pfn_prot(vma, at + done, pfn + (done >> PAGE_SHIFT), prot);

		if (ret != VM_FAULT_NOPAGE)
			goto fail;
	}
	return 0;

fail:
	/*
	 * The driver does not look at the result. A context that stayed loaded without being mapped would fault for
	 * ever; so it goes, and the next touch comes here again (the first SIGBUS may have a handler). The caller
	 * holds the context's lock.
	 */
	gru_unload_context(gts, 1);
	force_sig(SIGBUS);
	return -EFAULT;
}

pte_t tlbridge_huge_pte(pte_t *entry, unsigned long vaddr)
{
	pmd_t pmd = READ_ONCE(*(pmd_t *)entry);
	unsigned long pfn = pmd_pfn(pmd) + ((vaddr & ~PMD_MASK) >> PAGE_SHIFT);

	return pfn_pte(pfn, __pgprot(pmd_flags(pmd) & ~_PAGE_PSE));
}

/*
 * How long an engine that is awake may take to begin with a TGH. One that has its processor needs a few microseconds.
 */
#define ENGINE_PATIENCE_US	20

/*
 * Whether an engine ends the flush in that time. The word is what the driver is going to wait for, with preemption
 * off and in most cases a lock held; the device clears the command with the status. The clock is the one that the
 * driver itself takes its time from.
 */
static bool engine_flushes(volatile void *line)
{
	volatile unsigned long *word = line;
	cycles_t begin = get_cycles();

	while (*word & 1) {
		if (get_cycles() - begin > (cycles_t)tsc_khz * ENGINE_PATIENCE_US / 1000)
			return false;
		cpu_relax();
	}
	return true;
}

/* The rule of protos/src/gru/doorbell.rs. */
void tlbridge_flush_cache(volatile void *line)
{
	unsigned long offset;

	if (unlikely(tlbridge_stand_in_has(line))) {
		tlbridge_stand_in_execute(line);
		return;
	}
	mb();
	if (dev->mode == TLBRIDGE_TRAP)
		return;
	offset = ((unsigned long)line - (unsigned long)dev->chiplets) & (TLBRIDGE_CHIPLET_BYTES - 1);
	if (offset >= GRU_TFM_BASE && (offset < GRU_TGH_BASE || offset >= GRU_CBE_BASE))
		return;
	/*
	 * An engine that counts as awake may have lost its processor, to this guest perhaps. The thread of the device that
	 * takes the ring executes TGHs itself, and this processor is free until that has been answered.
	 */
	if (dev->mode == TLBRIDGE_POLL && readl(dev->registers + TLBRIDGE_STATUS_AWAKE) &&
	    (offset < GRU_TGH_BASE || engine_flushes(line)))
		return;
	writel(1, dev->registers + TLBRIDGE_DOORBELL);
}
