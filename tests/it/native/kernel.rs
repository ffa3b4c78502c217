//! A guest that does what one letter tells it: a PVH kernel of a hundred bytes, and a boot sector for the way through SeaBIOS.

/// Where the kernel is loaded and begins.
const AT: u32 = 0x10_0000;

/// 32-bit code at `AT`. It prints "R" on COM1 and obeys the first letter of its command line, then what is typed on COM1:
/// "o" switches off, "t" is a triple fault, "x" is an SSE instruction, after which it prints "S". It also switches off when
/// the power button is pressed.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x8b, 0x73, 0x18,                   //          mov   esi, [ebx+24]     the command line, from the start info
    0x8a, 0x1e,                         //          mov   bl, [esi]
    0x66, 0xba, 0xf8, 0x03,             //          mov   dx, 0x3f8
    0xb0, b'R', 0xee,                   //          mov   al, 'R'; out dx, al
    0x88, 0xd8,                         //          mov   al, bl
    0xeb, 0x20,                         //          jmp   obey
    0xb9, 0x20, 0x4e, 0x00, 0x00,       // wait:    mov   ecx, 20000
    0xe2, 0xfe,                         //          loop  $
    0x66, 0xba, 0x00, 0x06,             //          mov   dx, 0x600         PM1 status
    0x66, 0xed,                         //          in    ax, dx
    0xf6, 0xc4, 0x01,                   //          test  ah, 1             the power button
    0x75, 0x2e,                         //          jnz   off
    0x66, 0xba, 0xfd, 0x03,             //          mov   dx, 0x3fd         COM1: line status
    0xec, 0xa8, 0x01,                   //          in    al, dx; test al, 1
    0x74, 0xe5,                         //          jz    wait
    0x66, 0xba, 0xf8, 0x03, 0xec,       //          mov   dx, 0x3f8; in al, dx
    0x3c, b'o', 0x74, 0x1c,             // obey:    cmp   al, 'o'; je off
    0x3c, b't', 0x74, 0x24,             //          cmp   al, 't'; je triple
    0x3c, b'x', 0x75, 0xd4,             //          cmp   al, 'x'; jne wait
    0xb8, 0x00, 0x06, 0x00, 0x00,       //          mov   eax, 0x600        OSFXSR, OSXMMEXCPT
    0x0f, 0x22, 0xe0,                   //          mov   cr4, eax
    0x0f, 0x58, 0xc0,                   //          addps xmm0, xmm0
    0x66, 0xba, 0xf8, 0x03,             //          mov   dx, 0x3f8
    0xb0, b'S', 0xee,                   //          mov   al, 'S'; out dx, al
    0xeb, 0xc0,                         //          jmp   wait
    0x66, 0xba, 0x04, 0x06,             // off:     mov   dx, 0x604         PM1 control
    0x66, 0xb8, 0x00, 0x20,             //          mov   ax, 0x2000        SLP_EN with type 0: S5
    0x66, 0xef,                         //          out   dx, ax
    0xeb, 0xb4,                         //          jmp   wait
    0x0f, 0x01, 0x1d, 0x65, 0x00, 0x10, 0x00, // triple: lidt [none]
    0x0f, 0x0b,                         //          ud2
    0, 0, 0, 0, 0, 0,                   // none:    no interrupt table at all
];

/// The bytes of `addps xmm0, xmm0`, as the log of a guest prints them.
pub const SSE_BYTES: &str = "0f, 58, c0";

/// 16-bit code at 0000:7c00. Prints "R" on COM1, then waits for the power button and switches off.
#[rustfmt::skip]
const SECTOR: &[u8] = &[
    0xba, 0xf8, 0x03,                   //          mov   dx, 0x3f8
    0xb0, b'R', 0xee,                   //          mov   al, 'R'; out dx, al
    0xfb, 0xf4,                         // wait:    sti; hlt
    0xba, 0x00, 0x06, 0xed,             //          mov   dx, 0x600; in ax, dx
    0xf6, 0xc4, 0x01,                   //          test  ah, 1
    0x74, 0xf5,                         //          jz    wait
    0xba, 0x04, 0x06,                   //          mov   dx, 0x604
    0xb8, 0x00, 0x20, 0xef,             //          mov   ax, 0x2000; out dx, ax
    0xeb, 0xec,                         //          jmp   wait
];

/// The kernel as a 32-bit ELF with a PVH note.
pub fn elf() -> Vec<u8> {
    const HEADER: u32 = 52;
    const PROGRAM_HEADER: u32 = 32;
    const NOTE: u32 = 20;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + NOTE;
    let len = u32::try_from(CODE.len()).unwrap();
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 3].map(u16::to_le_bytes).concat()); // an executable for the 386
    file.extend([1, AT, HEADER, 0, 0].map(u32::to_le_bytes).concat());
    file.extend([52u16, 32, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1, code_at, AT, AT, len, len, 7, 4].map(u32::to_le_bytes).concat()); // PT_LOAD
    file.extend([4, note_at, 0, 0, NOTE, NOTE, 4, 4].map(u32::to_le_bytes).concat()); // PT_NOTE
    file.extend([4u32, 4, 18].map(u32::to_le_bytes).concat()); // XEN_ELFNOTE_PHYS32_ENTRY
    file.extend(b"Xen\0");
    file.extend(AT.to_le_bytes());
    file.extend(CODE);
    file
}

/// A disk of 1 MiB that SeaBIOS starts.
pub fn disk() -> Vec<u8> {
    let mut file = SECTOR.to_vec();
    file.resize(510, 0);
    file.extend([0x55, 0xaa]);
    file.resize(1 << 20, 0);
    file
}

#[test]
fn the_jumps_of_the_small_guests_lead_where_their_comments_say() {
    let target = |code: &[u8], at: usize| at + 2 + usize::from(code[at + 1]) - if code[at + 1] > 127 { 256 } else { 0 };
    let (wait, obey, off, triple) = (0x10, 0x30, 0x50, 0x5c);
    for (at, to) in [(0x0e, obey), (0x20, off), (0x29, wait), (0x32, off), (0x36, triple), (0x3a, wait), (0x4e, wait)] {
        assert_eq!(target(CODE, at), to, "{at:#x}");
    }
    assert_eq!((CODE[obey], CODE[triple], CODE.len()), (0x3c, 0x0f, 0x65 + 6));
    assert_eq!((target(SECTOR, 15), target(SECTOR, 24)), (6, 6));
}
