//! Inputs and outputs of commands that have fields of their own beyond a number or a context.
//!
//! Each input begins with its opcode (bits 31:16 of the first word) and op_mod (bits 15:0 of the second); each
//! output with its status (first byte) and syndrome (second word). An object's number is the low 24 bits of the
//! word at 8, in inputs that name one and in outputs that make one.

use super::layout::layout;

/// Where contexts of EQs, CQs, mkeys, SRQs begin, in inputs and outputs.
pub const CONTEXT: usize = 0x10;
/// Where a QP's context begins.
pub const QP_CONTEXT: usize = 0x18;
/// Where a receive memory pool's context begins.
pub const RMP_CONTEXT: usize = 0x20;
/// Where page addresses and translations begin.
pub const PAGES: usize = 0x110;
/// Bytes of a MAD.
pub const MAD_SIZE: usize = 256;
/// Bytes of an access register that this device answers at most.
pub const REGISTER: usize = 0x20;

layout! {
    /// What every input begins with.
    Input[16] {
        /// [`super::cmd::Opcode`].
        OPCODE = bits(0x00, 16, 16),
        /// DevX user.
        UID = bits(0x00, 0, 16),
        /// Modifier.
        OP_MOD = bits(0x04, 0, 16),
        /// The object.
        NUMBER = bits(0x08, 0, 24),
        /// All of the same word.
        ARGUMENT = bits(0x08, 0, 32),
        /// The word after it.
        SECOND = bits(0x0c, 0, 32),
    }
}

layout! {
    /// What every output begins with.
    Output[16] {
        /// [`super::cmd::Status`].
        STATUS = bits(0x00, 24, 8),
        /// Why.
        SYNDROME = bits(0x04, 0, 32),
        /// The object that was made.
        NUMBER = bits(0x08, 0, 24),
    }
}

layout! {
    /// CREATE_EQ without the context and the pages.
    CreateEq[0x78] {
        /// Events 0 to 63, as two words.
        EVENTS = wide(0x58),
    }
}

layout! {
    /// CREATE_MKEY without the context and the translations.
    CreateMkey[0x110] {
        /// MTT entries have access bits.
        PG_ACCESS = bits(0x0c, 31, 1),
        /// Translations that follow, in 16 bytes.
        TRANSLATIONS_ACTUAL = bits(0x60, 0, 32),
    }
}

layout! {
    /// A transition of a QP, without the context.
    ModifyQp[0x18] {
        /// [`super::qp::opt`].
        OPT_PARAM_MASK = bits(0x10, 0, 32),
    }
}

layout! {
    /// MODIFY_CQ, without the context and the pages.
    ModifyCq[0x10] {
        /// The queue.
        NUMBER = bits(0x08, 0, 24),
        /// What changes: [`super::cq::MODIFY_PERIOD`] and the like, or [`super::cq::RESIZE_SIZE`] and the like.
        FIELDS = bits(0x0c, 0, 32),
    }
}
/// MODIFY_CQ, op_mod: another buffer.
pub const MODIFY_CQ_RESIZE: u16 = 1;

layout! {
    /// MODIFY_RMP, without the context.
    ModifyRmp[0x20] {
        /// State.
        STATE = bits(0x08, 28, 4),
        /// The pool.
        NUMBER = bits(0x08, 0, 24),
        /// What changes.
        MASK = wide(0x10),
    }
}

layout! {
    /// QUERY_ISSI's answer.
    QueryIssiOut[112] {
        /// Current step.
        CURRENT = bits(0x08, 0, 16),
        /// Steps 0 to 31 that are supported.
        SUPPORTED = bits(0x6c, 0, 32),
    }
}

layout! {
    /// QUERY_ADAPTER's answer.
    QueryAdapterOut[272] {
        /// OUI.
        IEEE_VENDOR_ID = bits(0x28, 0, 24),
    }
}
/// Board id in [`QueryAdapterOut`], 16 characters.
pub const ADAPTER_PSID: usize = 0x100;

layout! {
    /// QUERY_SPECIAL_CONTEXTS' answer.
    QuerySpecialContextsOut[32] {
        /// The key of all memory.
        RESERVED_LKEY = bits(0x0c, 0, 32),
        /// The key of nothing.
        NULL_MKEY = bits(0x10, 0, 32),
    }
}

layout! {
    /// MAD_IFC without the MAD, which begins at [`CONTEXT`] of input and output.
    MadIfc[16] {
        /// Port.
        PORT = bits(0x08, 0, 8),
    }
}

layout! {
    /// QUERY_HCA_VPORT_CONTEXT's answer.
    QueryHcaVportContextOut[528] {
        /// A GRH is needed.
        GRH_REQUIRED = bits(0x30, 28, 1),
        /// Physical state.
        PORT_PHYSICAL_STATE = bits(0x30, 12, 4),
        /// Port state.
        PORT_STATE = bits(0x30, 4, 4),
        /// Virtual port's state.
        VPORT_STATE = bits(0x30, 0, 4),
        /// System image.
        SYSTEM_IMAGE_GUID = wide(0x38),
        /// Port.
        PORT_GUID = wide(0x40),
        /// Node.
        NODE_GUID = wide(0x48),
        /// Capability mask.
        CAP_MASK1 = bits(0x50, 0, 32),
        /// LID.
        LID = bits(0x70, 16, 16),
        /// Subnet manager's LID.
        SM_LID = bits(0x74, 16, 16),
    }
}

layout! {
    /// ACCESS_REG without the register's bytes, which follow.
    AccessRegister[16] {
        /// Register id.
        ID = bits(0x08, 0, 16),
        /// Argument.
        ARGUMENT = bits(0x0c, 0, 32),
    }
}
/// ACCESS_REG, op_mod: write. (1: read.)
pub const REGISTER_WRITE: u16 = 0;
/// [`AccessRegister::ID`]: capabilities of a port.
pub const REGISTER_PCAP: u32 = 0x5001;
/// Offset of the capability mask in that register.
pub const PCAP_MASK: usize = 4;
/// [`AccessRegister::ID`]: the host's byte order.
pub const REGISTER_HOST_ENDIANNESS: u32 = 0x7004;

layout! {
    /// ATTACH_TO_MCG, DETACH_FROM_MCG.
    Multicast[32] {
        /// QP.
        QPN = bits(0x08, 0, 24),
        /// Group, upper half.
        MGID_H = wide(0x10),
        /// Group, lower half.
        MGID_L = wide(0x18),
    }
}

layout! {
    /// PAGE_FAULT_RESUME.
    PageFaultResume[16] {
        /// It could not be handled.
        ERROR = bits(0x08, 31, 1),
        /// Memory scheme: token, upper bits.
        TOKEN_47_32 = bits(0x08, 0, 16),
        /// Memory scheme: token, lower bits.
        TOKEN_31_0 = bits(0x0c, 0, 32),
    }
}
