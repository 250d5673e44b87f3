/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What tlbridge_uv.ko (the PCI function, dressed up as an SGI UV blade) offers to gru.ko.
 */
#ifndef TLBRIDGE_UV_H
#define TLBRIDGE_UV_H

#include <linux/types.h>
#include <linux/pci.h>

struct module;

/* The same numbers as protos/src/gru (map.rs, pci.rs, doorbell.rs) of the project. */
#define TLBRIDGE_CHIPLETS		2
#define TLBRIDGE_CHIPLET_BYTES		0x8000000UL
#define TLBRIDGE_CHIPLETS_BYTES		(TLBRIDGE_CHIPLETS * TLBRIDGE_CHIPLET_BYTES)
#define TLBRIDGE_TFMS			16
#define TLBRIDGE_VECTORS		(TLBRIDGE_CHIPLETS * TLBRIDGE_TFMS)
#define TLBRIDGE_DOORBELL		0x0000
#define TLBRIDGE_STATUS_AWAKE		0x1000
#define TLBRIDGE_STATUS_MODE		0x1014

enum tlbridge_mode {
	TLBRIDGE_TRAP,	/* every store is seen by the device: no bell */
	TLBRIDGE_BELL,	/* each start needs a ring */
	TLBRIDGE_POLL,	/* a start needs a ring if nobody is awake */
};

struct tlbridge_uv_device {
	struct kref ref;
	struct pci_dev *pdev;
	phys_addr_t chiplets_paddr;
	void *chiplets;			/* BAR2, aligned to the chiplet's size */
	void __iomem *registers;	/* BAR0 */
	enum tlbridge_mode mode;
	bool gone;			/* removed; only the mapping is left */
};

/* Both calls come in process context. */
struct tlbridge_uv_driver {
	struct module *owner;
	/* While the device still works: nothing of the driver may touch it when this has returned. */
	void (*unplugged)(struct tlbridge_uv_device *dev);
	/* The last call: the driver has ended, or its init has failed. */
	void (*released)(void);
};

/*
 * From the driver's init. NULL: there is no device, or it has a driver. The device stays mapped until the owner is
 * gone, which is noticed by itself (also when its init fails).
 */
struct tlbridge_uv_device *tlbridge_uv_claim(struct tlbridge_uv_driver *driver);
/* From the driver's exit, before anything is torn down: waits for an unplug that is under way. */
void tlbridge_uv_leave(struct tlbridge_uv_driver *driver);

/* Vector chiplet * 16 + TFM, bound to a CPU: the Linux irq, or an error. */
int tlbridge_uv_setup_vector(struct tlbridge_uv_device *dev, unsigned int vector, unsigned int cpu);
void tlbridge_uv_teardown_vector(unsigned int irq);

#endif
