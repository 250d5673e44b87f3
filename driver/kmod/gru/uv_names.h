/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Other names for the data behind uv_hub.h's inline functions, so that those run, as they are, on the tables of
 * tlbridge_uv.ko. To be included before any other header.
 */
#ifndef TLBRIDGE_UV_NAMES_H
#define TLBRIDGE_UV_NAMES_H

#define __uv_cpu_info		tlbridge_uv_cpu_info
#define __uv_hub_info_list	tlbridge_uv_hub_info_list
#define uv_possible_blades	tlbridge_uv_possible_blades
#define uv_undefined		tlbridge_uv_undefined

#endif
