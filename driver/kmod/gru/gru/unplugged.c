// SPDX-License-Identifier: GPL-2.0
/*
 * The device is taken away from a driver that has contexts open and knows no such thing.
 *
 * From then on the driver works on ordinary memory laid out like the chiplets, where each command is done at once,
 * by the hook in its cache flush: contexts load and unload, flushes find nothing, instructions of the driver itself
 * end in an exception. Programs get SIGBUS at the next touch of a GSEG. When the last one has closed, gru.ko can be
 * removed, and loaded again on another device.
 */
#include "override.h"

#include "gru.h"
#include "grulib.h"
#include "grutables.h"
#include "gruhandles.h"
#include "tlbridge_uv.h"
#include "unplugged.h"

/* All contexts of a chiplet share the pages of one GSEG: their contents mean nothing any more. */
#define GSEG_PAGES	(GRU_GSEG_PAGESIZE / PAGE_SIZE)
#define MCS_PAGES	((GRU_CCH_BASE - GRU_MCS_BASE + GRU_NUM_CCH * GRU_HANDLE_STRIDE) / PAGE_SIZE)
#define OWN_PAGES	(GSEG_PAGES + MCS_PAGES)
#define ALL_PAGES	(TLBRIDGE_CHIPLETS_BYTES / PAGE_SIZE)

static struct page *own[TLBRIDGE_CHIPLETS][OWN_PAGES];
static void *stand_in;
static bool unplugged;

void tlbridge_stand_in_destroy(void)
{
	unsigned int chiplet, i;

	if (stand_in)
		vunmap(stand_in);
	stand_in = NULL;
	for (chiplet = 0; chiplet < TLBRIDGE_CHIPLETS; chiplet++)
		for (i = 0; i < OWN_PAGES; i++) {
			if (own[chiplet][i])
				__free_page(own[chiplet][i]);
			own[chiplet][i] = NULL;
		}
}

static struct page *page_of(unsigned long number)
{
	unsigned long chiplet = number / (ALL_PAGES / TLBRIDGE_CHIPLETS);
	unsigned long in_chiplet = number % (ALL_PAGES / TLBRIDGE_CHIPLETS);

	if (in_chiplet < GRU_MCS_BASE / PAGE_SIZE)
		return own[chiplet][in_chiplet % GSEG_PAGES];
	return own[chiplet][GSEG_PAGES + (in_chiplet - GRU_MCS_BASE / PAGE_SIZE) % MCS_PAGES];
}

void *tlbridge_stand_in_create(void)
{
	unsigned long chiplet, i;
	struct page **pages;

	for (chiplet = 0; chiplet < TLBRIDGE_CHIPLETS; chiplet++)
		for (i = 0; i < OWN_PAGES; i++) {
			own[chiplet][i] = alloc_page(GFP_KERNEL | __GFP_ZERO);
			if (!own[chiplet][i])
				goto fail;
		}
	pages = kvmalloc_array(ALL_PAGES, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		goto fail;
	for (i = 0; i < ALL_PAGES; i++)
		pages[i] = page_of(i);
	stand_in = vmap(pages, ALL_PAGES, VM_MAP, PAGE_KERNEL);
	kvfree(pages);
	if (stand_in)
		return stand_in;
fail:
	pr_err("gru: no memory to stand in for a device that is removed\n");
	tlbridge_stand_in_destroy();
	return NULL;
}

bool tlbridge_stand_in_has(const volatile void *line)
{
	return (unsigned long)line - (unsigned long)stand_in < TLBRIDGE_CHIPLETS_BYTES;
}

bool tlbridge_is_unplugged(void)
{
	return READ_ONCE(unplugged);
}

/* The driver has started what is in this line (or only wants to look at it). */
void tlbridge_stand_in_execute(volatile void *line)
{
	unsigned long offset = ((unsigned long)line - (unsigned long)stand_in) & (TLBRIDGE_CHIPLET_BYTES - 1);

	if (offset < GRU_MCS_BASE) {
		volatile struct gru_instruction_bits *cb = line;

		if (!cb->icmd)
			return;
		cb->icmd = 0;
		/* With a substatus, the driver looks for no details and does not try again. */
		cb->isubstatus = CBSS_PUT_NACKED;
		cb->istatus = CBS_EXCEPTION;
		if (cb->ima & IMA_INTERRUPT && gru_base[0]->bs_async_wq)
			complete(gru_base[0]->bs_async_wq);
	} else if ((offset >= GRU_TGH_BASE && offset < GRU_CBE_BASE) || offset >= GRU_TFH_BASE) {
		volatile unsigned long *word = line;

		/* cmd and status; bit 1 is the driver's lock. */
		if (*word & 1)
			*word &= ~0x30001UL;
	}
}

/*
 * Misses that wait for an interrupt would hold up the unloading of their contexts, and nobody serves them any
 * more.
 */
static void fail_misses(struct tlbridge_uv_device *dev)
{
	unsigned int chiplet, i;

	for (chiplet = 0; chiplet < TLBRIDGE_CHIPLETS; chiplet++)
		for (i = 0; i < GRU_NUM_TFH; i++) {
			struct gru_tlb_fault_handle *tfh =
				get_tfh(dev->chiplets + chiplet * TLBRIDGE_CHIPLET_BYTES, i);

			if (tfh->status == TFHSTATUS_EXCEPTION && tfh->state == TFHSTATE_MISS_FMM)
				tfh_exception(tfh);
		}
}

static void unload(struct tlbridge_uv_device *dev, struct gru_state *gru, int ctxnum)
{
	struct gru_thread_state *gts;

	spin_lock(&gru->gs_lock);
	gts = gru->gs_gts[ctxnum];
	if (gts && !is_kernel_context(gts) && refcount_inc_not_zero(&gts->ts_refcnt)) {
		spin_unlock(&gru->gs_lock);
	} else {
		spin_unlock(&gru->gs_lock);
		return;
	}
	/* Whoever has the lock may be waiting for the device, and the device for the service of a miss. */
	while (!mutex_trylock(&gts->ts_ctxlock)) {
		fail_misses(dev);
		usleep_range(100, 1000);
	}
	if (gts->ts_gru == gru)
		gru_unload_context(gts, 1);
	mutex_unlock(&gts->ts_ctxlock);
	gts_drop(gts);
}

void tlbridge_unplugged(struct tlbridge_uv_device *dev)
{
	struct gru_blade_state *blade = gru_base[0];
	struct gru_state *gru;
	int i, chiplet;

	/* The driver's own instructions end while the device and its interrupts still work. */
	down_write(&blade->bs_kgts_sema);
	if (blade->bs_kgts && blade->bs_kgts->ts_gru)
		gru_unload_context(blade->bs_kgts, 0);

	WRITE_ONCE(unplugged, true);
	for_each_gru_on_blade(gru, 0, chiplet)
		WRITE_ONCE(gru->gs_gru_base_vaddr, stand_in + chiplet * TLBRIDGE_CHIPLET_BYTES);
	up_write(&blade->bs_kgts_sema);
	/* Flushes and interrupts that still use the device run with preemption off. */
	synchronize_rcu();

	/*
	 * Contexts that were loaded before are unloaded from the stand-in: what their programs see is unmapped, and
	 * the device's state is of no interest. Taking each lock waits out what is under way.
	 */
	for_each_gru_on_blade(gru, 0, chiplet)
		for (i = 0; i < GRU_NUM_CCH; i++)
			unload(dev, gru, i);

	for_each_gru_on_blade(gru, 0, chiplet)
		for (i = 0; i < GRU_NUM_TFM; i++) {
			int irq = gru->gs_irq[i];

			gru->gs_irq[i] = 0;
			if (irq) {
				free_irq(irq, NULL);
				tlbridge_uv_teardown_vector(irq);
			}
		}
}
