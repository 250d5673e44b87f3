//! What libibverbs and its users agree on in memory: the structures and constants of `<infiniband/verbs.h>` that are
//! used here, each with its size and offsets (rdma-core 56; the library keeps them within libibverbs.so.1).
//!
//! Three calls are no functions of the library but pointers in tables of the context: posting, polling, and what came
//! later ([`EXTENDED`], in front of the context).

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::offset_of;

/// `struct ibv_device`: only its address matters.
#[repr(C)]
#[derive(Debug)]
pub struct Device {
    _opaque: [u8; 0],
}

/// A pointer in a table that is not used here.
pub type Unused = *const c_void;
/// `poll_cq`: completions found, or negative.
pub type PollCq = unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int;
/// `post_send`: 0 or an errno.
pub type PostSend = unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int;
/// `advise_mr`: 0 or an errno.
pub type AdviseMr = unsafe extern "C" fn(*mut Pd, c_uint, u32, *mut Sge, u32) -> c_int;
/// `query_device_ex`: 0 or an errno.
pub type QueryDeviceEx = unsafe extern "C" fn(*mut Context, *const c_void, *mut DeviceAttrEx, usize) -> c_int;

/// `struct ibv_context_ops`.
#[repr(C)]
#[derive(Debug)]
pub struct ContextOps {
    _before_poll: [Unused; 11],
    /// Takes completions.
    pub poll_cq: Option<PollCq>,
    _before_send: [Unused; 13],
    /// Posts send work requests.
    pub post_send: Option<PostSend>,
    _rest: [Unused; 6],
}

/// `struct ibv_context`.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    /// The device.
    pub device: *mut Device,
    /// The data path.
    pub ops: ContextOps,
    /// The uverbs file.
    pub cmd_fd: c_int,
    /// The file of asynchronous events.
    pub async_fd: c_int,
    /// Completion vectors.
    pub num_comp_vectors: c_int,
    _mutex: libc::pthread_mutex_t,
    /// [`EXTENDED`]: a `struct verbs_context` ends with this context.
    pub abi_compat: *mut c_void,
}

/// `__VERBS_ABI_IS_EXTENDED`.
pub const EXTENDED: usize = usize::MAX;

/// Offsets in `struct verbs_context`.
pub mod extended {
    /// Its size with the context at its end.
    pub const SIZE: usize = CONTEXT + size_of::<super::Context>();
    /// `advise_mr`.
    pub const ADVISE_MR: usize = 8;
    /// `query_device_ex`.
    pub const QUERY_DEVICE_EX: usize = 216;
    /// How many bytes before its end the library knows.
    pub const SZ: usize = 312;
    /// The `struct ibv_context` inside.
    pub const CONTEXT: usize = 320;
}

/// `struct ibv_device_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeviceAttr {
    /// Firmware, as text.
    pub fw_ver: [c_char; 64],
    /// GUID, big-endian.
    pub node_guid: [u8; 8],
    _sys_image_guid: u64,
    /// Largest region.
    pub max_mr_size: u64,
    _page_size_cap: u64,
    /// Who made it.
    pub vendor_id: u32,
    /// Which model.
    pub vendor_part_id: u32,
    _hw_ver: u32,
    _max_qp: i32,
    /// Work requests of a queue.
    pub max_qp_wr: i32,
    _device_cap_flags: u32,
    _sges: [i32; 3],
    /// Entries of a completion queue.
    pub max_cqe: i32,
    /// Regions.
    pub max_mr: i32,
    _max_pd: i32,
    /// READs that a QP answers at once.
    pub max_qp_rd_atom: i32,
    _rd: [i32; 2],
    /// READs that a QP asks for at once.
    pub max_qp_init_rd_atom: i32,
    _more: [u32; 16],
    _pkeys: u16,
    _local_ca_ack_delay: u8,
    /// Ports.
    pub phys_port_cnt: u8,
}

/// `struct ibv_odp_caps`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct OdpCaps {
    /// [`ODP_SUPPORT`], [`ODP_SUPPORT_IMPLICIT`].
    pub general_caps: u64,
    /// What RC can do on such memory: [`ODP_SUPPORT_WRITE`], [`ODP_SUPPORT_READ`].
    pub rc_odp_caps: u32,
    /// UC.
    pub uc_odp_caps: u32,
    /// UD.
    pub ud_odp_caps: u32,
}

/// `struct ibv_device_attr_ex`. Libraries that know a shorter one leave the rest zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeviceAttrEx {
    /// What there always was.
    pub orig_attr: DeviceAttr,
    _comp_mask: u32,
    /// On-demand paging.
    pub odp_caps: OdpCaps,
    _rest: [u64; 17],
}

/// `struct ibv_port_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PortAttr {
    /// [`PORT_ACTIVE`].
    pub state: u32,
    _max_mtu: u32,
    /// 1 = 256 bytes to 5 = 4096.
    pub active_mtu: u32,
    /// Entries of the GID table.
    pub gid_tbl_len: i32,
    _port_cap_flags: u32,
    /// Longest message.
    pub max_msg_sz: u32,
    _violations: [u32; 2],
    _pkey_tbl_len: u16,
    /// Local identifier (InfiniBand).
    pub lid: u16,
    _sm_lid: u16,
    _bytes: [u8; 8],
    /// [`LINK_LAYER_ETHERNET`] or InfiniBand.
    pub link_layer: u8,
    _flags: u8,
    _port_cap_flags2: u16,
    _active_speed_ex: u32,
}

/// `struct ibv_pd`.
#[repr(C)]
#[derive(Debug)]
pub struct Pd {
    /// Its device.
    pub context: *mut Context,
    _handle: u32,
}

/// `struct ibv_mr`.
#[repr(C)]
#[derive(Debug)]
pub struct Mr {
    _context: *mut Context,
    _pd: *mut Pd,
    _addr: *mut c_void,
    _length: usize,
    _handle: u32,
    /// For this side's queues.
    pub lkey: u32,
    /// For the other side's.
    pub rkey: u32,
}

/// `struct ibv_cq`: its beginning.
#[repr(C)]
#[derive(Debug)]
pub struct Cq {
    /// Its device.
    pub context: *mut Context,
}

/// `struct ibv_qp`: its beginning.
#[repr(C)]
#[derive(Debug)]
pub struct Qp {
    /// Its device.
    pub context: *mut Context,
    _pointers: [*mut c_void; 5],
    _handle: u32,
    /// Its number.
    pub qp_num: u32,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct QpCap {
    /// Send work requests.
    pub max_send_wr: u32,
    /// Receive work requests.
    pub max_recv_wr: u32,
    /// Pieces of one.
    pub max_send_sge: u32,
    /// Pieces of one.
    pub max_recv_sge: u32,
    /// Bytes in a work request itself.
    pub max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
#[derive(Debug)]
pub struct QpInitAttr {
    /// The program's own.
    pub qp_context: *mut c_void,
    /// Completions of sends.
    pub send_cq: *mut Cq,
    /// Completions of receives.
    pub recv_cq: *mut Cq,
    /// None.
    pub srq: *mut c_void,
    /// Sizes.
    pub cap: QpCap,
    /// [`QPT_RC`].
    pub qp_type: u32,
    /// Whether each work request completes visibly.
    pub sq_sig_all: c_int,
}

/// `struct ibv_ah_attr` with its `struct ibv_global_route`.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, Default)]
pub struct AhAttr {
    /// Destination.
    pub dgid: [u8; 16],
    /// Flow.
    pub flow_label: u32,
    /// Own address: its index.
    pub sgid_index: u8,
    /// Hops.
    pub hop_limit: u8,
    /// Class.
    pub traffic_class: u8,
    /// Destination (InfiniBand).
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Path bits.
    pub src_path_bits: u8,
    /// Rate.
    pub static_rate: u8,
    /// Whether the addresses above count.
    pub is_global: u8,
    /// Port.
    pub port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct QpAttr {
    /// [`QPS_INIT`] and so on.
    pub qp_state: u32,
    pub(crate) _cur_qp_state: u32,
    /// As [`PortAttr::active_mtu`].
    pub path_mtu: u32,
    pub(crate) _path_mig_state: u32,
    pub(crate) _qkey: u32,
    /// First expected packet.
    pub rq_psn: u32,
    /// First sent packet.
    pub sq_psn: u32,
    /// The other one.
    pub dest_qp_num: u32,
    /// What the other one may do.
    pub qp_access_flags: c_uint,
    pub(crate) _cap: QpCap,
    /// The way there.
    pub ah_attr: AhAttr,
    pub(crate) _alt_ah_attr: AhAttr,
    pub(crate) _pkeys: [u16; 2],
    pub(crate) _drain: [u8; 2],
    /// READs that this one asks for at once.
    pub max_rd_atomic: u8,
    /// READs that this one answers at once.
    pub max_dest_rd_atomic: u8,
    /// 12 = 0.64 ms.
    pub min_rnr_timer: u8,
    /// Port.
    pub port_num: u8,
    /// 4.096 us * 2^timeout.
    pub timeout: u8,
    /// Retransmissions.
    pub retry_cnt: u8,
    /// 7 = for ever.
    pub rnr_retry: u8,
    pub(crate) _alt: [u8; 2],
    pub(crate) _rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Sge {
    /// Where.
    pub addr: u64,
    /// How much.
    pub length: u32,
    /// By which key.
    pub lkey: u32,
}

/// `struct ibv_send_wr` of an RDMA operation.
#[repr(C)]
#[derive(Debug)]
pub struct SendWr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// The next one.
    pub next: *mut SendWr,
    /// Local memory.
    pub sg_list: *mut Sge,
    /// Pieces.
    pub num_sge: c_int,
    /// [`WR_RDMA_WRITE`] or [`WR_RDMA_READ`].
    pub opcode: u32,
    /// [`SEND_SIGNALED`].
    pub send_flags: c_uint,
    /// Not used here.
    pub imm_data: u32,
    /// The other side's memory.
    pub remote_addr: u64,
    /// By which key.
    pub rkey: u32,
    /// Of other operations.
    pub rest: [u64; 9],
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Wc {
    /// Of the work request.
    pub wr_id: u64,
    /// 0 = fine.
    pub status: u32,
    _opcode: u32,
    /// What the device says beyond that.
    pub vendor_err: u32,
    /// Length.
    pub byte_len: u32,
    _imm: u32,
    /// Whose.
    pub qp_num: u32,
    _src_qp: u32,
    _wc_flags: u32,
    _ud: [u32; 2],
}

/// `IBV_ACCESS_LOCAL_WRITE`.
pub const ACCESS_LOCAL_WRITE: c_uint = 1;
/// `IBV_ACCESS_REMOTE_WRITE`.
pub const ACCESS_REMOTE_WRITE: c_uint = 2;
/// `IBV_ACCESS_REMOTE_READ`.
pub const ACCESS_REMOTE_READ: c_uint = 4;
/// `IBV_ACCESS_ON_DEMAND`.
pub const ACCESS_ON_DEMAND: c_uint = 64;
/// `IBV_ODP_SUPPORT`.
pub const ODP_SUPPORT: u64 = 1;
/// `IBV_ODP_SUPPORT_IMPLICIT`.
pub const ODP_SUPPORT_IMPLICIT: u64 = 2;
/// `IBV_ODP_SUPPORT_WRITE`.
pub const ODP_SUPPORT_WRITE: u32 = 4;
/// `IBV_ODP_SUPPORT_READ`.
pub const ODP_SUPPORT_READ: u32 = 8;
/// `IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE`.
pub const ADVICE_PREFETCH_WRITE: c_uint = 1;
/// `IBV_ADVISE_MR_FLAG_FLUSH`: return when it is done.
pub const ADVISE_FLUSH: u32 = 1;
/// `IBV_QPT_RC`.
pub const QPT_RC: u32 = 2;
/// `IBV_QPS_INIT`.
pub const QPS_INIT: u32 = 1;
/// `IBV_QPS_RTR`.
pub const QPS_RTR: u32 = 2;
/// `IBV_QPS_RTS`.
pub const QPS_RTS: u32 = 3;
/// `IBV_WR_RDMA_WRITE`.
pub const WR_RDMA_WRITE: u32 = 0;
/// `IBV_WR_RDMA_READ`.
pub const WR_RDMA_READ: u32 = 4;
/// `IBV_SEND_SIGNALED`.
pub const SEND_SIGNALED: c_uint = 2;
/// `IBV_PORT_ACTIVE`.
pub const PORT_ACTIVE: u32 = 4;
/// `IBV_LINK_LAYER_ETHERNET`.
pub const LINK_LAYER_ETHERNET: u8 = 2;

/// Bits of `enum ibv_qp_attr_mask`.
pub mod qp_mask {
    use std::ffi::c_int;
    /// Reset to INIT: state, access flags, pkey index, port.
    pub const TO_INIT: c_int = 1 | 8 | 16 | 32;
    /// INIT to RTR: state, way, MTU, receive PSN, READs answered, RNR timer, destination.
    pub const TO_RTR: c_int = 1 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20;
    /// RTR to RTS: state, timeout, retries, RNR retries, READs asked for, send PSN.
    pub const TO_RTS: c_int = 1 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16;
}

// offsetof and sizeof of rdma-core 56 on x86-64.
#[cfg(target_arch = "x86_64")]
const _: () = {
    assert!(size_of::<ContextOps>() == 256 && offset_of!(ContextOps, poll_cq) == 88);
    assert!(offset_of!(ContextOps, post_send) == 200);
    assert!(
        size_of::<Context>() == 328 && offset_of!(Context, ops) == 8 && offset_of!(Context, cmd_fd) == 264
    );
    assert!(offset_of!(Context, abi_compat) == 320 && extended::SIZE == 648);
    assert!(size_of::<DeviceAttr>() == 232 && offset_of!(DeviceAttr, max_mr_size) == 80);
    assert!(offset_of!(DeviceAttr, vendor_id) == 96 && offset_of!(DeviceAttr, max_qp_wr) == 112);
    assert!(offset_of!(DeviceAttr, max_cqe) == 132 && offset_of!(DeviceAttr, max_mr) == 136);
    assert!(
        offset_of!(DeviceAttr, max_qp_rd_atom) == 144 && offset_of!(DeviceAttr, max_qp_init_rd_atom) == 156
    );
    assert!(offset_of!(DeviceAttr, phys_port_cnt) == 227);
    assert!(size_of::<OdpCaps>() == 24 && offset_of!(OdpCaps, rc_odp_caps) == 8);
    assert!(size_of::<DeviceAttrEx>() == 400 && offset_of!(DeviceAttrEx, odp_caps) == 240);
    assert!(size_of::<PortAttr>() == 56 && offset_of!(PortAttr, max_msg_sz) == 20);
    assert!(offset_of!(PortAttr, lid) == 34 && offset_of!(PortAttr, link_layer) == 46);
    assert!(size_of::<Mr>() == 48 && offset_of!(Mr, lkey) == 36 && offset_of!(Mr, rkey) == 40);
    assert!(offset_of!(Qp, qp_num) == 52);
    assert!(size_of::<QpInitAttr>() == 64 && offset_of!(QpInitAttr, cap) == 32);
    assert!(offset_of!(QpInitAttr, qp_type) == 52);
    assert!(
        size_of::<AhAttr>() == 32 && offset_of!(AhAttr, dlid) == 24 && offset_of!(AhAttr, is_global) == 29
    );
    assert!(size_of::<QpAttr>() == 144 && offset_of!(QpAttr, qp_access_flags) == 32);
    assert!(offset_of!(QpAttr, ah_attr) == 56 && offset_of!(QpAttr, max_rd_atomic) == 126);
    assert!(offset_of!(QpAttr, port_num) == 129 && offset_of!(QpAttr, rnr_retry) == 132);
    assert!(size_of::<Sge>() == 16 && size_of::<SendWr>() == 128);
    assert!(offset_of!(SendWr, remote_addr) == 40 && offset_of!(SendWr, rkey) == 48);
    assert!(size_of::<Wc>() == 48 && offset_of!(Wc, vendor_err) == 16 && offset_of!(Wc, qp_num) == 28);
};
