/* SPDX-License-Identifier: GPL-2.0 */
/* What stands in for the device after its removal. */
#ifndef TLBRIDGE_UNPLUGGED_H
#define TLBRIDGE_UNPLUGGED_H

#include <linux/types.h>
#include "tlbridge_uv.h"

void *tlbridge_stand_in_create(void);
void tlbridge_stand_in_destroy(void);
bool tlbridge_stand_in_has(const volatile void *line);
void tlbridge_stand_in_execute(volatile void *line);
void tlbridge_unplugged(struct tlbridge_uv_device *dev);
bool tlbridge_is_unplugged(void);

#endif
