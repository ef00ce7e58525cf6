//! BPF objects without DWARF, which is five sixths of them: what the kernel, bpftool and the verifier's log show is BTF.

use anyhow::{Context as _, Result};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

/// The object without it. Nothing else changes.
pub fn stripped(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("reading a BPF object")?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete |= name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    // Symbols that stood for those sections.
    builder.delete_orphans();
    // LLVM keeps sections' names among those of symbols.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing a BPF object")?;
    Ok(stripped)
}
