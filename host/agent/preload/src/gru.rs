//! The C interface: GRU contexts (`include/tlbridge.h`).

use crate::interface::{errno_of, failed};
use agent::{AgentError, ContextOptions, ExecuteError, FaultMode, GruContext, Instruction};
use libc::{c_int, c_void, size_t};
use protos::gru::cb::{Control, ExplicitOp, ImplicitOp, XType};

/// `struct tlb_instruction`: the words of a control block, DW0 to DW5.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TlbInstruction {
    control: u64,
    idef4: u64,
    baddr0: u64,
    nelem: u64,
    stride_op1: u64,
    baddr1_value_op2: u64,
}

impl From<Instruction> for TlbInstruction {
    fn from(i: Instruction) -> Self {
        Self {
            control: i.control.into_bits(),
            idef4: i.idef4,
            baddr0: i.baddr0,
            nelem: i.nelem,
            stride_op1: i.stride_op1,
            baddr1_value_op2: i.baddr1_value_op2,
        }
    }
}

impl From<TlbInstruction> for Instruction {
    fn from(i: TlbInstruction) -> Self {
        Self {
            control: Control::from_bits(i.control),
            idef4: i.idef4,
            baddr0: i.baddr0,
            nelem: i.nelem,
            stride_op1: i.stride_op1,
            baddr1_value_op2: i.baddr1_value_op2,
        }
    }
}

/// `struct tlb_completion`.
#[repr(C)]
pub struct TlbCompletion {
    avalue: u64,
    tag: u64,
    ecause: u32,
    opc: u32,
    exception_address: u64,
}

/// Load.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_vload(
    va: u64,
    ds: u32,
    xtype: u8,
    nelem: u64,
    stride: u64,
) -> TlbInstruction {
    Instruction::vload(va, ds, XType(xtype), nelem, stride).into()
}

/// Store.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_vstore(
    va: u64,
    ds: u32,
    xtype: u8,
    nelem: u64,
    stride: u64,
) -> TlbInstruction {
    Instruction::vstore(va, ds, XType(xtype), nelem, stride).into()
}

/// Set.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_vset(
    va: u64,
    value: u64,
    xtype: u8,
    nelem: u64,
    stride: u64,
) -> TlbInstruction {
    Instruction::vset(va, value, XType(xtype), nelem, stride).into()
}

/// Copy.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_bcopy(
    src: u64,
    dst: u64,
    ds: u32,
    lines: u32,
    xtype: u8,
    nelem: u64,
) -> TlbInstruction {
    Instruction::bcopy(src, dst, ds, lines, XType(xtype), nelem).into()
}

/// Atomic without operand.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_gamir(va: u64, op: u8, xtype: u8) -> TlbInstruction {
    Instruction::gamir(va, ImplicitOp(op), XType(xtype)).into()
}

/// Atomic with operands.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_instruction_gamer(va: u64, op: u8, op1: u64, op2: u64, xtype: u8) -> TlbInstruction {
    Instruction::gamer(va, ExplicitOp(op), op1, op2, XType(xtype)).into()
}

/// A context.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_context_create(cbs: u32, ds_bytes: u32, user_polling: c_int) -> *mut GruContext {
    let options = ContextOptions {
        cbs,
        ds_bytes,
        fault_mode: if user_polling != 0 {
            FaultMode::UserPolling
        } else {
            FaultMode::Interrupt
        },
    };
    match agent::current()
        .ok_or(AgentError::NotAttached)
        .and_then(|a| a.create_context(&options))
    {
        Ok(context) => Box::into_raw(Box::new(context)),
        Err(e) => {
            failed(&e, errno_of(&e));
            std::ptr::null_mut()
        }
    }
}

/// Give a context back.
///
/// # Safety
/// `context` is null or comes from `tlb_context_create` and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_context_destroy(context: *mut GruContext) {
    if !context.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(context) });
    }
}

/// Control blocks of a context.
///
/// # Safety
/// `context` comes from `tlb_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_context_cbs(context: *const GruContext) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { &*context }.cbs()
}

/// Data segment bytes of a context.
///
/// # Safety
/// `context` comes from `tlb_context_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_context_ds_bytes(context: *const GruContext) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { &*context }.ds_bytes()
}

/// Run an instruction.
///
/// # Safety
/// `context` comes from `tlb_context_create`; `instruction` can be read; `completion` is null or can be
/// written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_gru_execute(
    context: *const GruContext,
    cb: u32,
    instruction: *const TlbInstruction,
    completion: *mut TlbCompletion,
) -> c_int {
    // SAFETY: the caller's promise.
    let result = unsafe { (*context).execute(cb, &(*instruction).into()) };
    let (answer, status) = match result {
        Ok(c) => (
            TlbCompletion {
                avalue: c.avalue,
                tag: c.tag,
                ecause: 0,
                opc: 0,
                exception_address: 0,
            },
            0,
        ),
        Err(ExecuteError::Exception(e)) => {
            failed(&e, libc::EFAULT);
            let answer = TlbCompletion {
                avalue: 0,
                tag: u64::MAX,
                ecause: e.ecause,
                opc: e.opc,
                exception_address: e.exceptdet0,
            };
            (answer, 1)
        }
        Err(ExecuteError::Agent(e)) => return failed(&e, errno_of(&e)),
    };
    if !completion.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *completion = answer };
    }
    status
}

/// Write to the data segment.
///
/// # Safety
/// `context` comes from `tlb_context_create`; `len` bytes at `data` can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_ds_write(
    context: *const GruContext,
    offset: u32,
    data: *const c_void,
    len: size_t,
) -> c_int {
    // SAFETY: the caller's promise.
    let result = unsafe { (*context).ds_write(offset, std::slice::from_raw_parts(data.cast(), len)) };
    result.map_or_else(|e| failed(&e, errno_of(&e)), |()| 0)
}

/// Read from the data segment.
///
/// # Safety
/// `context` comes from `tlb_context_create`; `len` bytes at `data` can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_ds_read(
    context: *const GruContext,
    offset: u32,
    data: *mut c_void,
    len: size_t,
) -> c_int {
    // SAFETY: the caller's promise; zeroed before it is seen as a slice.
    let result = unsafe {
        data.cast::<u8>().write_bytes(0, len);
        (*context).ds_read(offset, std::slice::from_raw_parts_mut(data.cast(), len))
    };
    result.map_or_else(|e| failed(&e, errno_of(&e)), |()| 0)
}
