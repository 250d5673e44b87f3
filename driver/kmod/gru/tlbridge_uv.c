// SPDX-License-Identifier: GPL-2.0
/*
 * Binds tlbridge's GRU (PCI function 10a9:4752) and describes the machine as one SGI UV2 blade with two chiplets,
 * so that the kernel's own sgi-gru driver, which knows hubs and no PCI functions, finds what it looks for.
 *
 * One device at a time, and one driver on it. They come and go in any order:
 *
 *   no driver     -> claim (init) -> live -> leaving (exit) -> no driver
 *                                    live -> unplugged     -> no driver
 *
 * The ends of a driver's init and exit are known from the module notifier, which tells of an init that failed as
 * well. A removal of the function waits out init and exit.
 */
#include "uv_names.h"

#include <linux/cpumask.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/irq.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nodemask.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/proc_fs.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <asm/uv/uv_hub.h>
#include <asm/uv/uv_mmrs.h>

#include "tlbridge_uv.h"

#define BAR_REGISTERS	0
#define BAR_CHIPLETS	2

/*
 * A guest-physical address is below 2^46, and its global form is the address itself (m_val, m_shift, n_lshift of
 * the hub).
 */
#define ADDRESS_BITS	46
/*
 * The driver's kernel context has a control block (of 128) for each possible CPU and four for its own test of
 * asynchronous instructions.
 */
#define MOST_CPUS	124

DEFINE_PER_CPU(struct uv_cpu_info_s, tlbridge_uv_cpu_info);
EXPORT_PER_CPU_SYMBOL_GPL(tlbridge_uv_cpu_info);

static struct uv_hub_info_s hub;
static void *hubs[] = { &hub };
void **tlbridge_uv_hub_info_list = hubs;
EXPORT_SYMBOL_GPL(tlbridge_uv_hub_info_list);

short tlbridge_uv_possible_blades = 1;
EXPORT_SYMBOL_GPL(tlbridge_uv_possible_blades);

unsigned long tlbridge_uv_undefined(char *name)
{
	pr_err("tlbridge_uv: a hub of type UV2 has no register %s\n", name);
	return 0;
}
EXPORT_SYMBOL_GPL(tlbridge_uv_undefined);

/* All nodes of the machine are on blade 0. */
static unsigned short node_to_blade[MAX_NUMNODES];

enum claim { FREE, INIT, LIVE, LEAVING };

static DEFINE_MUTEX(lock);
static DECLARE_WAIT_QUEUE_HEAD(changed);
/* All under the lock. */
static struct tlbridge_uv_device *present;
static struct tlbridge_uv_driver *claimer;
static struct tlbridge_uv_device *claimed;
static enum claim claim;

static struct proc_dir_entry *proc;

static void describe_hub(void)
{
	unsigned int cpu;

	hub.hub_type = UV2;
	hub.hub_revision = UV2_HUB_REVISION_BASE;
	hub.m_val = ADDRESS_BITS;
	hub.m_shift = 64 - ADDRESS_BITS;
	hub.n_lshift = ADDRESS_BITS;
	hub.gpa_mask = (1UL << ADDRESS_BITS) - 1;
	hub.nr_possible_cpus = nr_cpu_ids;
	hub.nr_online_cpus = num_online_cpus();
	hub.memory_nid = first_memory_node;
	hub.node_to_socket = node_to_blade;
	for_each_possible_cpu(cpu) {
		struct uv_cpu_info_s *info = per_cpu_ptr(&tlbridge_uv_cpu_info, cpu);

		info->p_uv_hub_info = &hub;
		info->blade_cpu_id = cpu;
	}
}

static void device_free(struct kref *ref)
{
	struct tlbridge_uv_device *dev = container_of(ref, struct tlbridge_uv_device, ref);

	iounmap((void __iomem *)dev->chiplets);
	iounmap(dev->registers);
	pci_dev_put(dev->pdev);
	kfree(dev);
}

static void device_put(struct tlbridge_uv_device *dev)
{
	kref_put(&dev->ref, device_free);
}

struct tlbridge_uv_device *tlbridge_uv_claim(struct tlbridge_uv_driver *driver)
{
	struct tlbridge_uv_device *dev = NULL;

	mutex_lock(&lock);
	if (!present) {
		pr_warn("tlbridge_uv: no device for %s, which will do nothing: load it again when there is one\n",
			driver->owner->name);
	} else if (claim != FREE) {
		pr_warn("tlbridge_uv: %s is refused: %s has the device\n", driver->owner->name,
			claimer->owner->name);
	} else {
		dev = present;
		kref_get(&dev->ref);
		claimer = driver;
		claimed = dev;
		claim = INIT;
	}
	mutex_unlock(&lock);
	return dev;
}
EXPORT_SYMBOL_GPL(tlbridge_uv_claim);

void tlbridge_uv_leave(struct tlbridge_uv_driver *driver)
{
	mutex_lock(&lock);
	if (claimer == driver)
		claim = LEAVING;
	mutex_unlock(&lock);
}
EXPORT_SYMBOL_GPL(tlbridge_uv_leave);

static int module_event(struct notifier_block *block, unsigned long event, void *data)
{
	mutex_lock(&lock);
	if (claimer && claimer->owner == data) {
		if (event == MODULE_STATE_LIVE) {
			claim = LIVE;
		} else if (event == MODULE_STATE_GOING) {
			claimer->released();
			device_put(claimed);
			claimer = NULL;
			claimed = NULL;
			claim = FREE;
		}
		wake_up_all(&changed);
	}
	mutex_unlock(&lock);
	return NOTIFY_DONE;
}

static struct notifier_block module_events = { .notifier_call = module_event };

int tlbridge_uv_setup_vector(struct tlbridge_uv_device *dev, unsigned int vector, unsigned int cpu)
{
	int irq, ret;

	if (vector >= TLBRIDGE_VECTORS)
		return -EINVAL;
	irq = pci_irq_vector(dev->pdev, vector);
	if (irq < 0)
		return irq;
	/*
	 * The handler serves the fault map of the CPU that it runs on. A vector that moved elsewhere would leave its
	 * map unserved, so nobody may move it.
	 */
	ret = irq_set_affinity(irq, cpumask_of(cpu));
	if (ret) {
		pci_err(dev->pdev, "vector %u cannot be bound to CPU %u: %d\n", vector, cpu, ret);
		return ret;
	}
	irq_modify_status(irq, 0, IRQ_NO_BALANCING);
	return irq;
}
EXPORT_SYMBOL_GPL(tlbridge_uv_setup_vector);

void tlbridge_uv_teardown_vector(unsigned int irq)
{
	irq_modify_status(irq, IRQ_NO_BALANCING, 0);
}
EXPORT_SYMBOL_GPL(tlbridge_uv_teardown_vector);

static int check_bar(struct pci_dev *pdev, int bar, resource_size_t bytes)
{
	if (!(pci_resource_flags(pdev, bar) & IORESOURCE_MEM) || pci_resource_len(pdev, bar) < bytes) {
		pci_err(pdev, "BAR %d has %llu bytes, not the %llu of a GRU\n", bar,
			(u64)pci_resource_len(pdev, bar), (u64)bytes);
		return -ENODEV;
	}
	if (pci_resource_end(pdev, bar) >> ADDRESS_BITS) {
		pci_err(pdev, "BAR %d is above the %u address bits of the hub\n", bar, ADDRESS_BITS);
		return -ENODEV;
	}
	return 0;
}

static int map_device(struct tlbridge_uv_device *dev)
{
	struct pci_dev *pdev = dev->pdev;

	dev->registers = ioremap(pci_resource_start(pdev, BAR_REGISTERS), pci_resource_len(pdev, BAR_REGISTERS));
	if (!dev->registers)
		return -ENOMEM;
	/*
	 * Cacheable, as the real one. Where a page is trapped it makes no difference, and where it is mapped there is
	 * the host's ordinary memory behind it.
	 */
	dev->chiplets_paddr = pci_resource_start(pdev, BAR_CHIPLETS);
	dev->chiplets = (void __force *)ioremap_cache(dev->chiplets_paddr, TLBRIDGE_CHIPLETS_BYTES);
	if (!dev->chiplets) {
		iounmap(dev->registers);
		return -ENOMEM;
	}
	/* The driver finds a chiplet's base by masking addresses inside of it. */
	if (WARN_ON((unsigned long)dev->chiplets & (TLBRIDGE_CHIPLET_BYTES - 1))) {
		iounmap((void __iomem *)dev->chiplets);
		iounmap(dev->registers);
		return -ENXIO;
	}
	return 0;
}

static int probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct tlbridge_uv_device *dev;
	int ret;

	ret = pci_enable_device_mem(pdev);
	if (ret)
		return ret;
	ret = check_bar(pdev, BAR_REGISTERS, 0x2000) ?: check_bar(pdev, BAR_CHIPLETS, TLBRIDGE_CHIPLETS_BYTES);
	if (ret)
		goto disable;
	ret = pci_request_regions(pdev, "tlbridge_uv");
	if (ret)
		goto disable;
	/* Contexts of whoever had it before (a driver that lost it by a removal, a kernel that crashed) go. */
	ret = pci_reset_function_locked(pdev);
	if (ret)
		pci_warn(pdev, "cannot be reset (%d): contexts of a driver before may still be loaded\n", ret);
	pci_set_master(pdev);
	ret = pci_alloc_irq_vectors(pdev, TLBRIDGE_VECTORS, TLBRIDGE_VECTORS, PCI_IRQ_MSIX);
	if (ret < 0) {
		pci_err(pdev, "no %d MSI-X vectors: %d\n", TLBRIDGE_VECTORS, ret);
		goto release;
	}
	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev) {
		ret = -ENOMEM;
		goto vectors;
	}
	kref_init(&dev->ref);
	dev->pdev = pci_dev_get(pdev);
	ret = map_device(dev);
	if (ret)
		goto free;
	dev->mode = readl(dev->registers + TLBRIDGE_STATUS_MODE);
	if (dev->mode > TLBRIDGE_POLL) {
		pci_err(pdev, "doorbell mode %u is not known: the device is newer than this module\n", dev->mode);
		ret = -ENODEV;
		goto unmap;
	}

	mutex_lock(&lock);
	if (present) {
		pci_err(pdev, "one GRU at a time: %s is there already\n", pci_name(present->pdev));
		ret = -EBUSY;
	} else {
		present = dev;
		pci_set_drvdata(pdev, dev);
		ret = 0;
	}
	mutex_unlock(&lock);
	if (ret)
		goto unmap;
	pci_info(pdev, "GRU at %pa, doorbell mode %u\n", &dev->chiplets_paddr, dev->mode);
	return 0;

unmap:
	iounmap((void __iomem *)dev->chiplets);
	iounmap(dev->registers);
free:
	pci_dev_put(dev->pdev);
	kfree(dev);
vectors:
	pci_free_irq_vectors(pdev);
release:
	pci_release_regions(pdev);
disable:
	pci_disable_device(pdev);
	return ret;
}

static void remove(struct pci_dev *pdev)
{
	struct tlbridge_uv_device *dev = pci_get_drvdata(pdev);

	mutex_lock(&lock);
	while (claimed == dev && claim != LIVE) {
		mutex_unlock(&lock);
		wait_event(changed, claimed != dev || claim == LIVE);
		mutex_lock(&lock);
	}
	present = NULL;
	if (claimed == dev) {
		pci_warn(pdev, "removed while %s uses it\n", claimer->owner->name);
		claimer->unplugged(dev);
	}
	dev->gone = true;
	mutex_unlock(&lock);

	pci_free_irq_vectors(pdev);
	pci_clear_master(pdev);
	pci_release_regions(pdev);
	pci_disable_device(pdev);
	device_put(dev);
}

static const struct pci_device_id ids[] = {
	{ PCI_DEVICE(0x10a9, 0x4752) },
	{ }
};
MODULE_DEVICE_TABLE(pci, ids);

static struct pci_driver pci_driver = {
	.name = "tlbridge_uv",
	.id_table = ids,
	.probe = probe,
	.remove = remove,
};

static int __init start(void)
{
	int ret;

	if (nr_cpu_ids > MOST_CPUS) {
		pr_err("tlbridge_uv: %u CPUs are possible here, a GRU serves %u: boot with possible_cpus=%u\n",
		       nr_cpu_ids, MOST_CPUS, MOST_CPUS);
		return -E2BIG;
	}
	describe_hub();
	/* The driver makes its own directory in this one. */
	proc = proc_mkdir("sgi_uv", NULL);
	if (!proc)
		return -ENOMEM;
	ret = register_module_notifier(&module_events);
	if (ret)
		goto proc;
	ret = pci_register_driver(&pci_driver);
	if (ret)
		goto events;
	return 0;

events:
	unregister_module_notifier(&module_events);
proc:
	proc_remove(proc);
	return ret;
}

static void __exit stop(void)
{
	/* gru.ko uses our symbols: it is gone. */
	pci_unregister_driver(&pci_driver);
	unregister_module_notifier(&module_events);
	proc_remove(proc);
}

module_init(start);
module_exit(stop);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("tlbridge: a GRU on PCI as the blade of an SGI UV2");
