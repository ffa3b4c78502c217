# The built-in test guest: a few KiB of real-mode code that needs no firmware.
#
# Loaded at 0000:7c00 with its command line, ended by a zero byte, at 0000:0600. It greets on the VGA text screen and on COM1,
# shows the time once a second, and echoes what is typed on the keyboard or on COM1.
#
#   command line "quiet"    no clock: sleeps until a key comes
#                "flood"    prints 8 MiB of numbered lines by rep outsb, then goes on
#                "endless"  prints numbered lines for ever
#   key          q          quiet on and off          f   flood

        .code16
        .section .text
        .globl  _start

        .set    COM1, 0x3f8
        .set    CMDLINE, 0x600
        .set    LINE, 0x1000            # one line of the flood
        .set    LINE_BYTES, 64
        .set    FLOOD_LINES, 131072     # 8 MiB
        .set    TYPED_MAX, 40

_start:
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp

        call    set_vectors
        call    set_controllers
        call    set_serial
        call    clear_screen

        movw    $0xb800, %ax
        movw    %ax, %fs

        movw    $greeting, %si
        movw    $(160 * 2 + 4), %di
        movb    $0x0e, %ah
        call    screen_text
        movw    $help, %si
        movw    $(160 * 4 + 4), %di
        movb    $0x07, %ah
        call    screen_text
        movw    $typed_label, %si
        movw    $(160 * 8 + 4), %di
        call    screen_text
        movw    $greeting, %si
        call    serial_text
        movw    $newline, %si
        call    serial_text
        movw    $help, %si
        call    serial_text
        movw    $newline, %si
        call    serial_text

        movb    (CMDLINE), %al
        cmpb    $'q', %al
        jne     1f
        movb    $1, (quiet)
1:      cmpb    $'f', %al
        jne     1f
        movb    $1, (flood)
1:      cmpb    $'e', %al
        jne     1f
        movb    $2, (flood)
1:      call    set_clock
        call    show

# Everything happens in interrupts, but the flood, which may be interrupted.
main:
        cli
        cmpb    $0, (flood)
        jne     1f
        sti
        hlt
        jmp     main
1:      sti
        call    do_flood
        jmp     main

# ---- setting up ----

set_vectors:
        xorw    %di, %di
        movw    $256, %cx
1:      movw    $ignore, (%di)
        movw    $0, 2(%di)
        addw    $4, %di
        loop    1b
        movw    $on_keyboard, (0x09 * 4)
        movw    $on_serial, (0x0c * 4)
        movw    $on_clock, (0x70 * 4)
        ret

# 8259: interrupts 0 to 7 at vector 8, 8 to 15 at vector 70; keyboard, COM1 and clock are open.
set_controllers:
        movb    $0x11, %al
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $0x08, %al
        outb    %al, $0x21
        movb    $0x70, %al
        outb    %al, $0xa1
        movb    $0x04, %al
        outb    %al, $0x21
        movb    $0x02, %al
        outb    %al, $0xa1
        movb    $0x01, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $0xe9, %al
        outb    %al, $0x21
        movb    $0xfe, %al
        outb    %al, $0xa1
        # keyboard: interrupt on, translated to set 1, scanning
        movb    $0x60, %al
        outb    %al, $0x64
        movb    $0x65, %al
        outb    %al, $0x60
        movb    $0xf4, %al
        outb    %al, $0x60
        ret

set_serial:
        movw    $(COM1 + 3), %dx
        movb    $0x03, %al
        outb    %al, %dx
        movw    $(COM1 + 2), %dx
        movb    $0x07, %al
        outb    %al, %dx
        movw    $(COM1 + 4), %dx
        movb    $0x0b, %al
        outb    %al, %dx
        movw    $(COM1 + 1), %dx
        movb    $0x01, %al
        outb    %al, %dx
        ret

# The update-ended interrupt of the clock comes once a second, and not at all while quiet.
set_clock:
        movb    $0x0b, %al
        outb    %al, $0x70
        movb    $0x12, %al
        cmpb    $0, (quiet)
        je      1f
        movb    $0x02, %al
1:      outb    %al, $0x71
        movb    $0x0c, %al
        outb    %al, $0x70
        inb     $0x71, %al
        ret

clear_screen:
        movw    $0xb800, %ax
        movw    %ax, %es
        xorw    %di, %di
        movw    $0x0720, %ax
        movw    $2000, %cx
        rep stosw
        xorw    %ax, %ax
        movw    %ax, %es
        ret

# ---- interrupts ----

ignore:
        iret

on_clock:
        pushaw
        movb    $0x0c, %al
        outb    %al, $0x70
        inb     $0x71, %al
        call    show
        movb    $0x20, %al
        outb    %al, $0xa0
        outb    %al, $0x20
        popaw
        iret

on_keyboard:
        pushaw
        inb     $0x60, %al
        testb   $0x80, %al
        jnz     1f
        cmpb    $(keys_end - keys), %al
        jae     1f
        movzbw  %al, %bx
        movb    keys(%bx), %al
        testb   %al, %al
        jz      1f
        call    take_key
1:      movb    $0x20, %al
        outb    %al, $0x20
        popaw
        iret

on_serial:
        pushaw
1:      movw    $(COM1 + 5), %dx
        inb     %dx, %al
        testb   $1, %al
        jz      2f
        movw    $COM1, %dx
        inb     %dx, %al
        call    take_key
        jmp     1b
2:      movb    $0x20, %al
        outb    %al, $0x20
        popaw
        iret

# Key in al: a command or text.
take_key:
        cmpb    $'q', %al
        jne     1f
        xorb    $1, (quiet)
        call    set_clock
        jmp     show
1:      cmpb    $'f', %al
        jne     1f
        movb    $1, (flood)
        ret
1:      cmpb    $'\r', %al
        je      2f
        cmpb    $'\n', %al
        je      2f
        cmpb    $' ', %al
        jb      3f
        movw    (typed_bytes), %bx
        cmpw    $TYPED_MAX, %bx
        jb      1f
        xorw    %bx, %bx
1:      movb    %al, typed(%bx)
        incw    %bx
        jmp     4f
2:      xorw    %bx, %bx
4:      movb    $0, typed(%bx)
        movw    %bx, (typed_bytes)
        call    show
3:      ret

# ---- showing ----

# Time and typed text, on both consoles; on COM1 over the line before.
show:
        movw    $clock_text, %di
        movb    $0x04, %al
        call    clock_digits
        movb    $0x02, %al
        call    clock_digits
        movb    $0x00, %al
        call    clock_digits
        cmpb    $0, (flood)
        jne     1f
        movw    $clock_line, %si
        call    serial_text
        movw    $typed, %si
        call    serial_text
        movw    $erase, %si
        call    serial_text
1:      movw    $clock_text, %si
        movw    $(160 * 6 + 4), %di
        movb    $0x0f, %ah
        call    screen_text
        movw    $typed, %si
        movw    $(160 * 8 + 4 + 2 * (typed_label_end - typed_label)), %di
        movb    $0x0b, %ah
        call    screen_text
        movw    $TYPED_MAX, %cx
        subw    (typed_bytes), %cx
        movw    $0x0720, %ax
1:      movw    %ax, %fs:(%di)
        addw    $2, %di
        loop    1b
        ret

# Two digits of the clock register in al, then one byte further at di.
clock_digits:
        outb    %al, $0x70
        inb     $0x71, %al
        movb    %al, %ah
        shrb    $4, %al
        andw    $0x0f0f, %ax
        addw    $0x3030, %ax
        movw    %ax, (%di)
        addw    $3, %di
        ret

# Text at si to the screen at di with attribute ah.
screen_text:
        lodsb
        testb   %al, %al
        jz      1f
        movw    %ax, %fs:(%di)
        addw    $2, %di
        jmp     screen_text
1:      ret

# Text at si to COM1.
serial_text:
        movw    $COM1, %dx
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, %dx
        jmp     1b
2:      ret

# ---- the flood ----

do_flood:
        movl    $0, (line_number)
1:      call    make_line
        movw    $LINE, %si
        movw    $LINE_BYTES, %cx
        movw    $COM1, %dx
        rep outsb
        incl    (line_number)
        cmpb    $2, (flood)
        je      1b
        cmpl    $FLOOD_LINES, (line_number)
        jb      1b
        movb    $0, (flood)
        ret

# "00000000 ....\r\n", the number in hexadecimal.
make_line:
        movl    (line_number), %eax
        movw    $(LINE + 8), %di
        movw    $8, %cx
1:      movl    %eax, %ebx
        andw    $15, %bx
        movb    digits(%bx), %dl
        decw    %di
        movb    %dl, (%di)
        shrl    $4, %eax
        loop    1b
        movw    $(LINE + 8), %di
        movw    $(LINE_BYTES - 10), %cx
        movb    $'.', %al
        rep stosb
        movb    $'\r', (LINE + LINE_BYTES - 2)
        movb    $'\n', (LINE + LINE_BYTES - 1)
        ret

# ---- data ----

greeting:       .asciz  "Welcome to Innkeeper. This is the built-in test guest."
help:           .asciz  "What you type is echoed below. q: clock on and off, f: 8 MiB of text on COM1"
newline:        .asciz  "\r\n"
typed_label:    .ascii  "Typed: "
typed_label_end: .byte  0
clock_line:     .ascii  "\r"
clock_text:     .asciz  "00:00:00"
erase:          .asciz  "\033[K"
digits:         .ascii  "0123456789abcdef"
keys:           .ascii  "\0\0331234567890-=\b\tqwertyuiop[]\r\0asdfghjkl;'`\0\\zxcvbnm,./\0*\0 "
keys_end:
quiet:          .byte   0
flood:          .byte   0
typed_bytes:    .word   0
line_number:    .long   0
typed:          .fill   TYPED_MAX + 1, 1, 0
