//! What the kernel makes of each program: how long it is, how many instructions the verifier goes through, and how much
//! stack it takes. Loads all of them with small maps of their own, and attaches none.

use std::io;
use std::os::fd::AsFd as _;

use affinity_common::abi::{MAPS, tail_calls::Stage};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use nix::sys::utsname::uname;
use serde::Serialize;

use super::attach::Direction;
use super::{LoadError, Touch, cgroup, load_stages, preflight};
use crate::object::OBJECT;
use crate::syscall;

/// A program as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Its name.
    pub program: &'static str,
    /// Instructions that are left when the verifier has taken out what is never reached.
    pub instructions: u32,
    /// Instructions that the verifier has gone through, those of every path counted: 1,000,000 are the limit.
    pub verified: u32,
    /// Bytes of stack, of at most 512: of its own and of the functions below, where there are any. None where the kernel
    /// does not show the instructions (`net.core.bpf_jit_harden=2`).
    pub stack: Option<u32>,
    /// Bytes of machine code.
    pub machine_code: u32,
}

/// All programs on the kernel that this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Footprints {
    /// The kernel's release.
    pub kernel: String,
    /// The programs, in the order of their names.
    pub programs: Vec<Footprint>,
}

/// Loads every program, looks at it, and forgets it.
///
/// # Errors
/// What the node lacks, or a rejection by the verifier.
pub fn footprints(verifier_log: bool) -> Result<Footprints, LoadError> {
    preflight::check_node()?;
    let mut loader = EbpfLoader::new();
    loader.override_global("AYA_LOG_LEVEL", &0u8, true);
    for spec in MAPS.iter().filter(|spec| spec.resizable) {
        // How large a map is makes no difference to a program.
        loader.map_max_entries(spec.name, 1024);
    }
    let mut object = loader.load(OBJECT).map_err(|error| LoadError::load(&error))?;
    load_stages(&mut object, verifier_log)?;
    for direction in Direction::ALL {
        super::load(&mut object, direction.program(), verifier_log)?;
    }
    super::load(&mut object, Touch::PROGRAM, verifier_log)?;
    cgroup::load(&mut object, verifier_log)?;
    let names = Direction::ALL.map(Direction::program).into_iter().chain(Stage::ALL.map(Stage::program));
    let mut names: Vec<&'static str> = names.chain([Touch::PROGRAM]).chain(cgroup::programs()).collect();
    names.sort_unstable();
    let programs = names.into_iter().map(|name| footprint(&object, name)).collect::<Result<_, _>>()?;
    let kernel = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Footprints { kernel, programs })
}

fn footprint(object: &Ebpf, name: &'static str) -> Result<Footprint, LoadError> {
    let program = object.program(name).ok_or(LoadError::NoProgram(name))?;
    let unknown = |error: ProgramError| LoadError::verifier(name, error, false);
    let info = match program {
        Program::SchedClassifier(program) => program.info(),
        Program::CgroupSockAddr(program) => program.info(),
        Program::CgroupSock(program) => program.info(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    let info = info.map_err(unknown)?;
    let bytes = info.size_translated().unwrap_or_default();
    let fd = program.fd().map_err(unknown)?;
    let shown = syscall::instructions(fd.as_fd(), bytes).map_err(|error: io::Error| unknown(error.into()))?;
    Ok(Footprint {
        program: name,
        instructions: bytes / 8,
        verified: info.verified_instruction_count().unwrap_or_default(),
        stack: shown.map(|instructions| stack(&instructions)),
        machine_code: info.size_jitted(),
    })
}

// Of an instruction (`linux/bpf.h`): how it is encoded.
const CLASS: u8 = 0x07;
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const MOVE_REGISTER: u8 = 0xbf;
const ADD_CONSTANT: u8 = 0x07;
const CALL: u8 = 0x85;
/// The source of a call that is of a function of the program's own.
const OWN_FUNCTION: u8 = 1;
/// The register that points to the stack's upper end.
const FRAME: u8 = 10;

/// An instruction, taken apart.
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    constant: i32,
}

impl From<&u64> for Instruction {
    fn from(word: &u64) -> Self {
        let [code, registers, offset @ .., c0, c1, c2, c3] = word.to_ne_bytes();
        // The kernel's bit fields: of a little-endian machine, the destination is the lower half.
        let (low, high) = (registers & 0xf, registers >> 4);
        let (destination, source) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
        let (offset, constant) = (i16::from_ne_bytes(offset), i32::from_ne_bytes([c0, c1, c2, c3]));
        Self { code, destination, source, offset, constant }
    }
}

/// How much stack a program takes: the deepest place that it reads, writes or takes the address of, of each of its functions,
/// added up along the deepest chain of calls, for each has a frame of its own.
///
/// The compiler takes the address of a place by a copy of the frame's register, and a constant that it adds to it next.
fn stack(words: &[u64]) -> u32 {
    let instructions: Vec<Instruction> = words.iter().map(Instruction::from).collect();
    let target = |at: usize, it: &Instruction| (at + 1).checked_add_signed(isize::from(it.offset));
    let is_call = |it: &Instruction| it.code == CALL && it.source == OWN_FUNCTION;
    let calls: Vec<(usize, usize)> = instructions
        .iter()
        .enumerate()
        .filter(|(_, it)| is_call(it))
        .filter_map(|(at, it)| Some((at, target(at, it)?)))
        .collect();
    let mut starts: Vec<usize> = [0].into_iter().chain(calls.iter().map(|(_, to)| *to)).collect();
    starts.sort_unstable();
    starts.dedup();
    depth(0, &instructions, &starts, &calls)
}

fn depth(start: usize, instructions: &[Instruction], starts: &[usize], calls: &[(usize, usize)]) -> u32 {
    let end = starts.iter().find(|other| **other > start).copied().unwrap_or(instructions.len());
    let own = instructions.get(start..end).unwrap_or_default();
    let pairs = own.iter().zip(own.iter().skip(1).map(Some).chain([None]));
    let deepest = pairs.map(|(it, next)| place(it, next)).max().unwrap_or(0);
    // The kernel allows no recursion.
    let below = calls.iter().filter(|(at, to)| (start..end).contains(at) && *to != start);
    deepest.next_multiple_of(8) + below.map(|(_, to)| depth(*to, instructions, starts, calls)).max().unwrap_or(0)
}

/// How far below the frame's upper end the place lies that an instruction and the next one reach.
fn place(it: &Instruction, next: Option<&Instruction>) -> u32 {
    let below = |offset: i32| u32::try_from(-i64::from(offset)).unwrap_or(0);
    match it.code & CLASS {
        LDX if it.source == FRAME => below(it.offset.into()),
        ST | STX if it.destination == FRAME => below(it.offset.into()),
        _ if it.code == MOVE_REGISTER && it.source == FRAME => match next {
            Some(next) if next.code == ADD_CONSTANT && next.destination == it.destination => below(next.constant),
            _ => 0,
        },
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> u64 {
        let registers =
            if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
        let ([o0, o1], [c0, c1, c2, c3]) = (offset.to_ne_bytes(), constant.to_ne_bytes());
        u64::from_ne_bytes([code, registers, o0, o1, c0, c1, c2, c3])
    }

    /// `*(u64 *)(r10 - n) = r1`, `r1 = *(u64 *)(r10 - n)`, `r2 = r10; r2 += -n`, as they are encoded.
    fn store(below: i16) -> u64 {
        word(0x7b, FRAME, 1, -below, 0)
    }

    fn load(below: i16) -> u64 {
        word(0x79, 1, FRAME, -below, 0)
    }

    fn address(below: i32) -> [u64; 2] {
        [word(MOVE_REGISTER, 2, FRAME, 0, 0), word(ADD_CONSTANT, 2, 0, 0, -below)]
    }

    const EXIT: u64 = 0x95;

    #[test]
    fn the_deepest_place_of_any_kind_counts() {
        assert_eq!(stack(&[u64::from_ne_bytes(EXIT.to_le_bytes())]), 0);
        assert_eq!(stack(&[store(16), load(40)]), 40);
        assert_eq!(stack(&[&[store(16)], &address(120)[..], &[load(8)]].concat()), 120);
        assert_eq!(stack(&[store(3)]), 8, "whole words");
        // Another register is no frame, whatever is added to it.
        assert_eq!(stack(&[word(0x7b, 1, 2, -64, 0), word(MOVE_REGISTER, 2, 3, 0, 0), address(64)[1]]), 0);
    }

    #[test]
    fn functions_below_have_frames_of_their_own() {
        let call = |offset| word(CALL, 0, OWN_FUNCTION, offset, 0);
        // Two functions after one another: their frames are not there at the same time.
        let program = [store(64), call(1), call(1), store(8), store(32)];
        assert_eq!(stack(&program), 64 + 32);
        // A helper's call is none of the program's own.
        assert_eq!(stack(&[store(64), word(CALL, 0, 0, 0, 1)]), 64);
    }
}
